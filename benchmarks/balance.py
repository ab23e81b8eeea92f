"""Load of the experts and how they interact, and what balances them (Figure 9): ``python benchmarks/balance.py``.

The first table, of each packaged model as it is and patched with NAMEx-Full and EP-CAMEx, layer by layer, on held-out
text. Load: the largest and the smallest share of the tokens that an expert gets, over an equal share; the imbalance,
which is the first less 1; the entropy of the shares, 1 where they are equal. Interaction: the cosine between two
experts' outputs to the same token, mean over tokens, and that between two domain vectors E_i - E_m (of the original,
which has no base expert, E_i itself); of each the mean, the least and the largest over all pairs of experts.

The second table, of short training without balancing, with the balance loss, and by a bias alone (loss-free, Wang et
al. 2024): a model from nothing, and the packaged `tiny`. The loss is the mean over the last tenth of the steps, the
imbalance too; the perplexity is of held-out text; the interaction is the mean over layers, |cosine| the mean of its
size over pairs.
"""

import argparse
import copy
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize
from transformers import AutoTokenizer
from transformers.activations import ACT2FN

from namex_hf import Recipe, patch_model
from namex_hf.bargaining import cosine
from namex_hf.checkpoint.resolve import PACKAGED, resolve
from namex_hf.evaluation.loading import load
from namex_hf.evaluation.perplexity import held_out_texts, perplexities
from namex_hf.evaluation.table import Table
from namex_hf.merging.experts import grams
from namex_hf.merging.routers import load_entropy
from namex_hf.merging.routing import expert_output
from namex_hf.training.gathered import base_of, experts_of

sys.path.append(str(Path(__file__).parents[1] / "finetune"))  # where training from nothing is

from expert_load import imbalance
from scratch import ROWS, Row, Schedule, mixed_batches, new_model, train

RECIPES = {"original": None, "namex-full": Recipe(), "ep-camex": Recipe(method="ep-camex")}
LENGTH, ASKED = 256, 1024  # tokens of a sequence; tokens whose outputs are compared


@dataclass(frozen=True)
class Layer:
    """One MoE layer on one text."""

    counts: torch.Tensor  # [experts], tokens that each got
    entropy: float  # of the load
    outputs: torch.Tensor  # [pairs], mean over tokens of the cosine between two experts' outputs
    vectors: torch.Tensor  # [pairs], cosine between two domain vectors


def pairs(cosines: torch.Tensor) -> torch.Tensor:
    """The entries above the diagonal of ``[experts, experts]``."""
    rows, columns = torch.triu_indices(len(cosines), len(cosines), offset=1)
    return cosines[rows, columns]


@torch.no_grad()
def measure(model: Any, ids: torch.Tensor) -> list[Layer]:
    """Every MoE layer of a model on sequences ``[sequences, length]``."""
    blocks = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    inputs: list[list[torch.Tensor]] = [[] for _ in blocks]
    chosen: list[list[torch.Tensor]] = [[] for _ in blocks]
    handles = []
    for block, given, index in zip(blocks, inputs, chosen, strict=True):

        def note(_: Any, args: Any, output: Any, given: Any = given, index: Any = index) -> None:
            given.append(args[0].flatten(0, -2))
            index.append(output[2])

        handles.append(block.gate.register_forward_hook(note))
    model.eval()
    for rows in ids.split(8):
        model(rows, use_cache=False)
    for handle in handles:
        handle.remove()
    return [
        layer_of(block, torch.cat(given), torch.cat(index), ACT2FN[model.config.hidden_act])
        for block, given, index in zip(blocks, inputs, chosen, strict=True)
    ]


def layer_of(block: Any, inputs: torch.Tensor, index: torch.Tensor, activation: Any) -> Layer:
    """Args: inputs of the block, ``[tokens, hidden]``; index, the experts of every token."""
    experts = experts_of(block)
    count = experts.count
    some = inputs[:: max(1, len(inputs) // ASKED)][:ASKED]
    outputs = (expert_output(some, experts.expert(number), activation) for number in range(count))
    said = torch.stack([normalize(output, dim=-1).flatten() for output in outputs])
    has_base = getattr(block, "base_expert", None) is not None
    base = base_of(block) if has_base else experts.zeros()
    vectors = cosine(grams(experts, base, "expert")[0])
    counts = index.flatten().bincount(minlength=count)
    return Layer(counts, load_entropy(index, count), pairs(said @ said.T / len(some)), pairs(vectors))


def three(values: torch.Tensor) -> str:
    """Mean, least and largest."""
    return f"{values.mean():.3f} ({values.min():.3f} to {values.max():.3f})"


def held_out_ids(tokenizer: Any, tokens: int) -> torch.Tensor:
    """The first tokens of every packaged held-out text, ``[sequences, LENGTH]``."""
    texts = [
        tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0, :tokens]
        for text in held_out_texts().values()
    ]
    return torch.cat([ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH) for ids in texts])


def of_packaged(name: str, tokens: int) -> Table:
    columns = ["", "layer", "largest load", "smallest", "imbalance", "entropy", "outputs", "domain vectors"]
    table = Table(columns, [])
    folder = resolve(name).folder
    ids = held_out_ids(AutoTokenizer.from_pretrained(folder), tokens)
    for label, recipe in RECIPES.items():
        model = load(folder) if recipe is None else patch_model(load(folder), recipe)
        for number, one in enumerate(measure(model, ids)):
            shares = one.counts.double() / one.counts.double().mean()
            loads = [f"{value:.2f}" for value in (shares.max(), shares.min(), imbalance(one.counts))]
            start = [label if number == 0 else "", str(number)]
            table.rows.append([*start, *loads, f"{one.entropy:.3f}", three(one.outputs), three(one.vectors)])
    return table


def trained(
    model: Any, row: Row, schedule: Schedule, tokenizer: Any, texts: dict[str, torch.Tensor], tokens: int
) -> list[str]:
    """Cells of a row of the second table; `model` is trained in place on `texts`."""
    found = train(model, row, mixed_batches(texts, schedule, 0), schedule, lambda: None)
    last = max(1, schedule.steps // 10)
    layers = measure(model, held_out_ids(tokenizer, tokens))
    held_out = [imbalance(one.counts) for one in layers]
    outputs, vectors = (torch.stack([getattr(one, name) for one in layers]) for name in ("outputs", "vectors"))
    return [
        f"{sum(found['loss'][-last:]) / last:.3f}",
        f"{perplexities(model, tokenizer, held_out_texts(), tokens, LENGTH)['mean']:.2f}",
        f"{sum(found['imbalance'][-last:]) / last:.2f}",
        f"{sum(held_out) / len(held_out):.2f}",
        three(outputs),
        f"{outputs.abs().mean():.3f}",
        three(vectors),
    ]


def training_text(tokenizer: Any) -> dict[str, torch.Tensor]:
    """Token ids of the packaged calibration text, by domain."""
    paths = sorted((PACKAGED / "calibration").glob("*.txt"))
    return {path.stem: torch.tensor(tokenizer(path.read_text("utf-8"), verbose=False).input_ids) for path in paths}


def of_training(options: argparse.Namespace) -> Table:
    columns = ("start", "balancing", "loss", "perplexity", "imbalance", "on held-out text")
    table = Table([*columns, "outputs", "|cosine|", "domain vectors"], [])
    tiny = PACKAGED / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    given = tokenizer, training_text(tokenizer), options.tokens
    scratch = Schedule(steps=options.steps, length=LENGTH, bias_rate=options.bias_rate)
    tuned = replace(scratch, steps=options.tune_steps, peak=1e-3, warm_up=10)
    settings: dict[str, dict[str, Any]] = {"none": {"balance": 0.0}, "loss": {}, "bias": {"balancing": "bias"}}
    packaged = load(tiny)
    for label, more in settings.items():
        row = ROWS["SMoE (Top-2)"]
        model = new_model(row, 0, len(tokenizer), LENGTH)
        table.rows.append(["nothing", label, *trained(model, row, replace(scratch, **more), *given)])
    for label, more in settings.items():
        row = Row(Recipe(method="smoe"), top_k=packaged.config.num_experts_per_tok)
        model = copy.deepcopy(packaged)
        table.rows.append(["tiny", label, *trained(model, row, replace(tuned, **more), *given)])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="*", default=["tiny", "tiny-deepseek"], help="of the first table (default: all)"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="of each held-out text (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="of 2,048 tokens, from nothing (default: %(default)s)")
    parser.add_argument("--tune-steps", type=int, default=60, help="likewise, of tiny (default: %(default)s)")
    parser.add_argument("--bias-rate", type=float, default=0.001, help="of the bias a step (default: %(default)s)")
    options = parser.parse_args()
    tables = {f"{name}: load and interaction": partial(of_packaged, name, options.tokens) for name in options.models}
    if options.steps and options.tune_steps:
        tables["balancing"] = partial(of_training, options)
    for title, table in tables.items():
        print("", title, "", *table().markdown(numbers=True), sep="\n")


if __name__ == "__main__":
    main()
