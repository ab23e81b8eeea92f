"""How cosine and StableMoE routing differ from the pretrained linear router: ``python benchmarks/routing.py``.

Three tables for each packaged model. Cosine: how decided the routers are (mean entropy, nats) with the scale that the
weights alone give and with the one matched on calibration text, and their agreement with the linear router. Stable: how
much of held-out text has ids that the calibration text had, agreement there, and perplexity over the original's, by
tokens of calibration text. Students of lower rank: what an assignment by a student of logits D e^T with few columns in
D agrees to, against that of the counts, and the bytes an id of each.
"""

import argparse
import copy
from typing import Any

import torch
from transformers import AutoTokenizer

from namex_hf import Recipe, patch_model
from namex_hf.calibration.text import calibration_text
from namex_hf.checkpoint.resolve import local_folder
from namex_hf.evaluation.loading import load
from namex_hf.evaluation.perplexity import held_out_texts, perplexities
from namex_hf.evaluation.table import Table
from namex_hf.merging.gate import Gate
from namex_hf.merging.routers import (
    assignment,
    cosine_form,
    cosines,
    mean_entropy,
    overlap,
    scale_by_entropy,
    scale_by_norms,
)
from namex_hf.merging.routing import TokenRouting, route

TOKENS, LENGTH, STEPS = 65536, 256, 400


@torch.no_grad()
def listen(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """What every layer's router is given for sequences, ``[tokens, hidden]``."""
    heard: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    for layer, found in zip(model.model.layers, heard, strict=True):
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_pre_hook(lambda _, given, found=found: found.append(given[0]))
    for rows in ids.split(8):
        model(rows, use_cache=False)
    return [torch.cat(found).flatten(0, -2) for found in heard if found]


def student(ids: torch.Tensor, routing: TokenRouting, experts: int, rank: int) -> torch.Tensor:
    """Logits ``[ids that occur, experts]`` of a student of this rank, by Adam on StableMoE's cross-entropy."""
    seen, place = ids.unique(return_inverse=True)
    cells = (place[:, None] * experts + routing.index).flatten()
    counts = cells.bincount(minlength=len(seen) * experts).view(len(seen), experts).float()
    draw = torch.Generator().manual_seed(0)
    left = (0.1 * torch.randn(len(seen), rank, generator=draw)).requires_grad_()
    right = torch.randn(experts, rank, generator=draw).requires_grad_()
    optimiser = torch.optim.Adam([left, right], lr=0.1)
    for _ in range(STEPS):
        optimiser.zero_grad()
        (-(counts * (left @ right.T).log_softmax(-1)).sum() / len(ids)).backward()
        optimiser.step()
    return (left @ right.T).detach()


def cosine_table(model: Any, inputs_of: list[torch.Tensor]) -> Table:
    scales_of = ("scale by norms", "entropy", "scale by entropy", "entropy")
    table = Table(["layer", "entropy, linear", *scales_of, "agreement"], [])
    blocks = [layer for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    for number, (layer, inputs) in enumerate(zip(blocks, inputs_of, strict=True)):
        router, norm = layer.mlp.gate.weight.detach(), layer.post_attention_layernorm.weight.detach()
        angles, logits = cosines(inputs, *cosine_form(router)), inputs @ router.T
        scales = scale_by_norms(router, norm), scale_by_entropy(logits, angles)
        top_k = layer.mlp.gate.top_k
        same = float(overlap(logits.topk(top_k).indices, angles.topk(top_k).indices).mean())
        cells = [f"{number}", f"{mean_entropy(logits):.3f}"]
        for scale in scales:
            cells += [f"{scale:.2f}", f"{mean_entropy(angles, scale):.3f}"]
        table.rows.append([*cells, f"{same:.3f}"])
    return table


def stable_table(original: Any, tokenizer: Any, budgets: list[int]) -> Table:
    table = Table(["tokens", "ids known", "agreement there", "agreement", "perplexity, ratio"], [])
    texts = held_out_texts()
    before = perplexities(original, tokenizer, texts, 8192)["mean"]
    for tokens in budgets:
        recipe = Recipe(method="smoe", routing="stable", calibration_tokens=tokens)
        model = patch_model(copy.deepcopy(original), recipe, tokenizer)
        after = perplexities(model, tokenizer, texts, 8192)["mean"]
        known, there, everywhere = held_out_agreement(original, model, tokenizer)
        values = (known, there, everywhere, after / before)
        table.rows.append([str(tokens), *(f"{value:.3f}" for value in values)])
    return table


def held_out_agreement(original: Any, model: Any, tokenizer: Any) -> tuple[float, float, float]:
    """Means over layers and domains: share of tokens whose id is known, agreement on these, agreement on all."""
    found = []
    for text in held_out_texts().values():
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[:, :8192]
        ids = ids.view(-1, LENGTH)
        blocks = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "gate")]
        for block, inputs in zip(blocks, listen(copy.deepcopy(original), ids), strict=True):
            same = overlap(block.gate(inputs)[2], block.route(inputs, ids.flatten())[1])
            known = block.stable_router.assignment[ids.flatten(), 0] >= 0
            found.append([known.float().mean(), same[known].mean(), same.mean()])
    return tuple(torch.tensor(found).mean(0).tolist())


def rank_table(model: Any, ids: torch.Tensor, inputs_of: list[torch.Tensor], ranks: list[int]) -> Table:
    """Learnt on seven of eight sequences; agreement on tokens of the others whose ids are known."""
    table = Table(["form", "bytes an id", "agreement on held-out contexts"], [])
    held_out = torch.arange(len(ids)) % 8 == 7
    tokens = held_out.repeat_interleave(ids.shape[1])
    learnt, others = ids[~held_out].flatten(), ids[held_out].flatten()
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    found: dict[str, list[float]] = {}
    for gate, inputs in zip(gates, inputs_of, strict=True):
        experts, top_k = len(gate.weight), gate.top_k
        routing = route(inputs, gate.weight.detach(), Gate(top_k))
        mine, theirs = (TokenRouting(routing.index[some], routing.value[some]) for some in (~tokens, tokens))
        table_of = assignment(learnt, mine, experts, model.config.vocab_size)
        known = table_of[others, 0] >= 0
        forms = {f"counts, int32 table, {4 * top_k}": table_of[others[known]].long()}
        place = torch.searchsorted(learnt.unique(), others[known])
        for rank in ranks:
            logits = student(learnt, mine, experts, rank)
            forms[f"rank {rank}, bfloat16, {2 * rank}"] = logits[place].topk(top_k).indices
        for form, chosen in forms.items():
            found.setdefault(form, []).append(float(overlap(theirs.index[known], chosen).mean()))
    for form, values in found.items():
        kind, size = form.rsplit(", ", 1)
        table.rows.append([kind, size, f"{sum(values) / len(values):.3f}"])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "tiny-deepseek"], metavar="MODEL")
    parser.add_argument("--budgets", nargs="+", type=int, default=[4096, 16384, 65536, 262144], metavar="TOKENS")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    arguments = parser.parse_args()
    for name in arguments.models:
        folder = local_folder(name)
        assert folder is not None
        original, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
        ids = calibration_text("packaged", tokenizer, TOKENS, LENGTH, 0).ids
        inputs_of = listen(copy.deepcopy(original), ids)
        for title, table in (
            ("cosine", cosine_table(original, inputs_of)),
            ("stable", stable_table(original, tokenizer, arguments.budgets)),
            ("students", rank_table(original, ids, inputs_of, arguments.ranks)),
        ):
            print("", f"{name}: {title}", "", *table.markdown(numbers=True), sep="\n")


if __name__ == "__main__":
    main()
