"""What each method does to the packaged models: ``python benchmarks/methods.py [--quick] [--only TEXT ...]``.

Perplexity on the packaged held-out text and held-out word problems answered exactly, for the original, two controls
(routed experts removed; all routed experts replaced by their plain average) and the methods.
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import AutoTokenizer

from namex_hf import Recipe, patch_model
from namex_hf.checkpoint.resolve import local_folder
from namex_hf.evaluation.arithmetic import exact_answers, held_out_problems
from namex_hf.evaluation.loading import load, without_routed_experts
from namex_hf.evaluation.perplexity import held_out_texts, perplexities
from namex_hf.evaluation.table import Table

Change = Callable[[Any], Any]


def patched(**fields: Any) -> Change:
    return lambda model: patch_model(model, Recipe(**fields), tokenizer_of(model))


class Both(nn.Module):
    """Two modules beside each other, their outputs summed."""

    def __init__(self, one: nn.Module, other: nn.Module):
        super().__init__()
        self.one, self.other = one, other

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.one(hidden_states) + self.other(hidden_states)


def shared_base(added: bool, **fields: Any) -> Change:
    """The base expert where the shared one is, behind its gate if it has one: added to it, or in its place.

    Top-k experts stay as they are, and what they leave over goes to no expert.
    """

    def change(model: Any) -> Any:
        model = patched(**fields)(model)
        for layer in model.model.layers:
            if hasattr(layer.mlp, "experts"):
                name = "shared_expert" if hasattr(layer.mlp, "shared_expert") else "shared_experts"
                base, layer.mlp.base_expert = layer.mlp.base_expert, None
                setattr(layer.mlp, name, Both(getattr(layer.mlp, name), base) if added else base)
        return model

    return change


def tokenizer_of(model: Any) -> Any:
    """Of the folder that a model was loaded from."""
    return AutoTokenizer.from_pretrained(model.config.name_or_path)


CALIBRATED = {"merge": "grouped", "fit": "router", "calibration_tokens": 16384, "error_weights": "sequence"}
ROWS: dict[str, Change] = {
    "original": lambda model: model,
    "routed experts removed": without_routed_experts,
    "plain average, one expert": patched(merge="grouped", experts=1, method="ep-camex"),
    "EP-CAMEx, residual": patched(method="ep-camex"),
    "NAMEx, residual": patched(method="namex"),
    "NAMEx-Full, residual": patched(),
    "NAMEx-Full, residual, momentum 0.9": patched(momentum="complex"),
    "NAMEx-Full, soft": patched(merge="soft"),
    "NAMEx-Full, soft, by segment": patched(merge="soft", routing_span="all"),
    "NAMEx-Full, soft, by segment, calibrated": patched(merge="soft", curvature="calibrated", calibration_tokens=16384),
    "NAMEx-Full, 12 of 16": patched(merge="grouped", experts=12),
    "NAMEx-Full, 12 of 16, calibrated": patched(**CALIBRATED, experts=12),
}
MORE: dict[str, Change] = {
    "NAMEx-Full, residual, mean disagreement": patched(disagreement="mean"),
    "NAMEx-Full, residual, momentum 0.9, pi/12": patched(momentum="complex", beta="0.9,0.2618"),
    "NAMEx-Full, residual, the paper's quaternion": patched(momentum="quaternion"),
    "NAMEx-Full, soft, momentum 0.9": patched(merge="soft", momentum="complex"),
    "NAMEx-Full, soft, aligned": patched(merge="soft", align="activations", calibration_tokens=16384),
    "NAMEx-Full, soft, renormalised": patched(merge="soft", renormalise=True),
    "NAMEx-Full, soft, renormalised, eta 0.9": patched(merge="soft", renormalise=True, eta=0.9),
    "NAMEx-Full, soft, all experts": patched(merge="soft", top_k=16),
    "NAMEx-Full, soft, by segment, momentum 0.9": patched(merge="soft", routing_span="all", momentum="complex"),
    "NAMEx-Full, soft, by segment of 16": patched(merge="soft", segment=16),
    "NAMEx-Full, soft, by the segment before": patched(merge="soft", routing_span="previous"),
    "NAMEx-Full, residual, base: first": patched(base="first"),
    "NAMEx-Full, residual, first layer sparse": patched(first_layer="sparse"),
    "NAMEx-Full, soft, first layer sparse": patched(merge="soft", first_layer="sparse"),
    "NAMEx-Full, base in the shared expert's place": shared_base(added=False),
    "NAMEx-Full, base added to the shared expert": shared_base(added=True),
    "CAMEx, residual": patched(method="camex"),
    "CAMEx, base in the shared expert's place": shared_base(added=False, method="camex"),
    "CAMEx, base added to the shared expert": shared_base(added=True, method="camex"),
    "CAMEx, residual, base: first": patched(method="camex", base="first"),
    "CAMEx, soft": patched(method="camex", merge="soft"),
    "CAMEx, soft, by segment": patched(method="camex", merge="soft", routing_span="all"),
    "CAMEx, soft, by segment, calibrated, base: mean": patched(
        method="camex", merge="soft", base="mean", curvature="calibrated", calibration_tokens=16384
    ),
    "SMEAR, soft": patched(method="smear", merge="soft"),
    "SMEAR, soft, by segment": patched(method="smear", merge="soft", routing_span="all"),
    "SMEAR, soft, by segment, calibrated": patched(
        method="smear", merge="soft", curvature="calibrated", calibration_tokens=16384
    ),
    "EP-CAMEx, 12 of 16": patched(merge="grouped", experts=12, method="ep-camex"),
    "EP-CAMEx, 8 of 16": patched(merge="grouped", experts=8, method="ep-camex"),
    "NAMEx-Full, 8 of 16": patched(merge="grouped", experts=8),
    "NAMEx-Full, 8 of 16, calibrated": patched(**CALIBRATED, experts=8),
    "NAMEx-Full, one expert": patched(merge="grouped", experts=1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens, problems and rows: some three minutes")
    parser.add_argument("--models", nargs="+", default=["tiny", "tiny-deepseek"], metavar="MODEL")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="of these rows those whose name has one of the texts")
    arguments = parser.parse_args()
    tokens, count = (2048, 32) if arguments.quick else (8192, None)
    rows = ROWS if arguments.quick else ROWS | MORE
    if arguments.only:
        rows = {row: change for row, change in rows.items() if any(text in row for text in arguments.only)}
    texts, problems = held_out_texts(), held_out_problems()[:count]
    console = Console(width=120)
    for name in arguments.models:
        folder = local_folder(name)
        assert folder is not None
        original, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
        title = f"{name}: perplexity, first {tokens} tokens of each held-out text; problems exact, of {len(problems)}"
        table = Table(["", *texts, "mean", "exact"], [])
        for row, change in rows.items():
            with console.status(f"{name}: {row}"):
                model = change(copy.deepcopy(original))
                scores = perplexities(model, tokenizer, texts, tokens)
                right = sum(exact_answers(model, tokenizer, problems))
            table.rows.append([row, *(f"{scores[domain]:.2f}" for domain in (*texts, "mean")), str(right)])
        print("", title, "", *table.markdown(numbers=True), sep="\n")


if __name__ == "__main__":
    main()
