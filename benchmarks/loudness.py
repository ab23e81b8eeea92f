"""How large the outputs of routed experts and of the base expert are: ``python benchmarks/loudness.py [MODEL ...]``.

Two tables a model, by MoE layer, on the first tokens of each packaged held-out text:

* mean square of the routed experts' output to a token, by text, relative to the mean over the texts. A saliency that
  counts norms of outputs keeps the experts of the loudest text.
* root mean square of the base expert's output over that of an expert's to a token of its own, for each `base`, under
  NAMEx-Full, whose base comes from the layer before, and CAMEx, whose base is each layer's own; then what `residual`
  with the default base adds, (1 - sum s) f_base(x), over the routed output of the original.

All inputs are those of the original.
"""

import argparse
import copy
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from namex_hf import Recipe, patch_model
from namex_hf.checkpoint.resolve import resolve
from namex_hf.evaluation.loading import load, tokenizer_of
from namex_hf.evaluation.perplexity import held_out_texts
from namex_hf.evaluation.table import Table
from namex_hf.models.sparse import left_over_mass

BASES = "shared", "first", "mean"
METHODS = "namex-full", "camex"


def mixtures(model: Any) -> dict[int, Any]:
    """Blocks with routed experts, by layer."""
    return {number: layer.mlp for number, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")}


def inputs_by_text(model: Any, tokenizer: Any, tokens: int) -> dict[str, dict[int, torch.Tensor]]:
    """``[tokens, hidden]`` that every MoE layer receives, by text and layer, in windows of 512."""
    received: dict[str, dict[int, list[torch.Tensor]]] = {}
    for name, text in held_out_texts().items():
        here = received[name] = defaultdict(list)

        def note(layer: int, module: nn.Module, given: Any, into: Any = here) -> None:
            into[layer].append(given[0].flatten(0, 1))

        hooks = [block.register_forward_pre_hook(partial(note, n)) for n, block in mixtures(model).items()]
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
        for rows in ids[: tokens // 512 * 512].view(-1, 512).split(8):
            model(rows)
        for hook in hooks:
            hook.remove()
    return {name: {layer: torch.cat(all_) for layer, all_ in here.items()} for name, here in received.items()}


def each_expert(block: Any, flat: torch.Tensor, chosen: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Expert by expert: its number and its outputs to the tokens that chose it, ``[tokens of it, hidden]``."""
    for number in chosen.unique().tolist():
        own = flat[(chosen == number).any(-1)]
        gate, up = (own @ block.experts.gate_up_proj[number].T).chunk(2, dim=-1)
        yield number, (block.experts.act_fn(gate) * up) @ block.experts.down_proj[number].T


def root_mean_square(rows: torch.Tensor) -> float:
    """Of the norms of ``[tokens, hidden]``."""
    return float(rows.square().sum(-1).mean().sqrt())


def by_text(blocks: dict[int, Any], inputs: dict[str, dict[int, torch.Tensor]]) -> Table:
    energy = {}
    for name, here in inputs.items():
        outputs = [routed(block, here[layer]) for layer, block in blocks.items()]
        energy[name] = torch.tensor([root_mean_square(output) ** 2 for output in outputs])
    mean = torch.stack(list(energy.values())).mean(0)
    rows = [[name, *(f"{value:.2f}" for value in (each / mean).tolist())] for name, each in energy.items()]
    return Table(["text", *(f"layer {n}" for n in blocks)], rows)


def routed(block: Any, flat: torch.Tensor) -> torch.Tensor:
    """Output of the top-k experts of an unpatched block, ``[tokens, hidden]``."""
    _, scores, chosen = block.gate(flat)
    return block.experts(flat, chosen, scores)


def of_bases(original: Any, tokenizer: Any, inputs: dict[int, torch.Tensor]) -> Table:
    patched = {
        (method, base): mixtures(patch_model(copy.deepcopy(original), Recipe(method=method, base=base), tokenizer))
        for method in METHODS
        for base in BASES
    }
    added = "residual adds, of the routed output"
    columns = [f"{method}, {base}" for method, base in patched]
    table = Table(["layer", *columns, added], [])
    for layer, block in mixtures(original).items():
        flat = inputs[layer]
        _, scores, chosen = block.gate(flat)
        expert = root_mean_square(torch.cat([rows for _, rows in each_expert(block, flat, chosen)]))
        outputs = {key: blocks[layer].base_expert(flat) for key, blocks in patched.items()}
        loudness = [root_mean_square(output) / expert for output in outputs.values()]
        share = root_mean_square(left_over_mass(scores) * outputs[METHODS[0], BASES[0]])
        share /= root_mean_square(routed(block, flat))
        table.rows.append([str(layer), *(f"{value:.4f}" for value in (*loudness, share))])
    return table


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", default=["tiny", "tiny-deepseek"], metavar="MODEL", help="a name or a folder"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="of each text (default: %(default)s)")
    options = parser.parse_args()
    for name in options.models:
        folder = resolve(name).folder
        model, tokenizer = load(folder), tokenizer_of(folder)
        inputs = inputs_by_text(model, tokenizer, options.tokens)
        print(f"{name}, {options.tokens} tokens of each text")
        together = {layer: torch.cat([here[layer] for here in inputs.values()]) for layer in mixtures(model)}
        for title, table in (
            ("routed output, mean square", by_text(mixtures(model), inputs)),
            ("base expert's output over an expert's", of_bases(model, tokenizer, together)),
        ):
            print("", title, "", *table.markdown(numbers=True), sep="\n")


if __name__ == "__main__":
    main()
