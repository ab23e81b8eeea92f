"""Which form of curvature pays under ``soft`` by segment: ``python benchmarks/curvature.py [--models tiny ...]``.

Every row merges by segments (NAMEx eq. 9) around each layer's own mean (CAMEx), neurons aligned unless it says
otherwise, with statistics of the same calibration text, taken before patching. ``full`` is the weighted least-squares
mean itself: a system of the inputs' width for every segment. ``diagonal`` and ``blocks`` keep a part of the second
moments; ``rank`` keeps the leading directions of every expert, which is what the package does. The others are computed
here.

Cost: a segment's merged matrix at true width (60 experts, 2048 columns), in tokens sent through such a matrix; a
segment has 64, and the original sends each of them through 4 experts. Perplexity as a ratio to the original's.
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoTokenizer

from namex_hf import Recipe, patch_model
from namex_hf.checkpoint.resolve import local_folder
from namex_hf.evaluation.loading import load
from namex_hf.evaluation.perplexity import held_out_texts, perplexities
from namex_hf.evaluation.table import Table
from namex_hf.merging.curvature import second_moment
from namex_hf.merging.experts import ExpertWeights
from namex_hf.merging.routing import TokenRouting, neurons
from namex_hf.models.soft import Merged, SoftExperts, swiglu
from namex_hf.patching.text import text_for

EXPERTS, COLUMNS = 60, 2048
Given = dict[int, tuple[torch.Tensor, TokenRouting]]
"""What the routed experts of each layer are given."""


class FormExperts(SoftExperts):
    """Eq. 9 under given second moments, in float64."""

    moments: tuple[torch.Tensor, torch.Tensor]  # of gate and up, and of down: c, [experts, columns, columns]
    usage: torch.Tensor  # p

    def forward(  # type: ignore[override]  # of its parent's arguments those that this benchmark needs
        self, tokens: torch.Tensor, shares: torch.Tensor, base: Merged, *_: object
    ) -> tuple[torch.Tensor, Merged]:
        merged = (
            self._merge(shares, self.gate_up_proj, base[0], self.moments[0]),
            self._merge(shares, self.down_proj, base[1], self.moments[1]),
        )
        return swiglu(tokens, merged, self.act_fn), merged

    def _merge(
        self, shares: torch.Tensor, experts: torch.Tensor, base: torch.Tensor, moment: torch.Tensor
    ) -> torch.Tensor:
        shares, experts = shares.double(), experts.double()
        rest = (1 - shares.sum(-1))[:, None, None]
        mean = torch.einsum("n,ncd->cd", self.usage, moment)
        product = torch.einsum("gn,nrc->grc", shares, experts @ moment) + rest * (base.double() @ mean)
        solved = torch.linalg.solve(torch.einsum("gn,ncd->gcd", shares, moment) + rest * mean, product.mT)
        return solved.mT.to(base)


def diagonal(moment: torch.Tensor) -> torch.Tensor:
    return torch.diag_embed(moment.diagonal(dim1=1, dim2=2))


def blocks(count: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def of(moment: torch.Tensor) -> torch.Tensor:
        size = moment.shape[-1] // count
        return moment * torch.block_diag(*[torch.ones(size, size)] * count)

    return of


ROWS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], torch.Tensor] | None, int]] = {
    "identity, not aligned": ({"align": "none"}, None, EXPERTS),
    "identity": ({"align": "activations"}, None, EXPERTS),
    "identity, aligned by weights": ({"align": "weights"}, None, EXPERTS),
    **{
        f"rank {rank}": ({"curvature": "calibrated", "rank": rank}, None, EXPERTS * (1 + 2 * rank))
        for rank in (1, 2, 4, 8, 16)
    },
    "rank 4, not aligned": ({"curvature": "calibrated", "align": "none"}, None, EXPERTS * 9),
    "diagonal": ({"align": "activations"}, diagonal, EXPERTS),
    "4 blocks": ({"align": "activations"}, blocks(4), EXPERTS * (1 + COLUMNS // 4)),
    "2 blocks": ({"align": "activations"}, blocks(2), EXPERTS * (1 + COLUMNS // 2)),
    "full": ({"align": "activations"}, lambda moment: moment, EXPERTS * (1 + COLUMNS)),
}
"""Fields of the recipe, a form computed here, and the cost."""


@torch.no_grad()
def listen(model: Any, ids: torch.Tensor) -> Given:
    """What every layer's routed experts are given for a text."""
    seen: dict[int, list[tuple[torch.Tensor, ...]]] = {}
    layers = {index: layer.mlp for index, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")}
    hooks = [
        mlp.experts.register_forward_pre_hook(lambda _, given, index=index: seen.setdefault(index, []).append(given))
        for index, mlp in layers.items()
    ]
    for rows in ids.split(8):
        model(input_ids=rows)
    for hook in hooks:
        hook.remove()
    found = {index: [torch.cat(parts) for parts in zip(*given, strict=True)] for index, given in seen.items()}
    return {index: (inputs, TokenRouting(chosen, value)) for index, (inputs, chosen, value) in found.items()}


@torch.no_grad()
def form(model: Any, given: Given, change: Callable[[torch.Tensor], torch.Tensor], ridge: float) -> None:
    """Let a patched model merge under the second moments that `change` leaves."""
    for index, (inputs, routing) in given.items():
        experts = model.model.layers[index].mlp.experts
        width, count = experts.intermediate_dim, experts.num_experts
        mass = routing.mass(count)
        moments: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
        for number in range(count):
            token, gate = routing.of(number)
            gate_up, down = experts.gate_up_proj[number], experts.down_proj[number]
            one = ExpertWeights(gate_up[:width], gate_up[width:], down)
            heard = inputs[token], neurons(inputs[token], one, experts.act_fn)
            for kept, part in zip(moments, heard, strict=True):
                kept.append(second_moment(part, gate).double() / mass[number])
        experts.__class__, experts.usage = FormExperts, mass / mass.sum()
        experts.moments = tuple(change(solid(torch.stack(kept), experts.usage, ridge)) for kept in moments)


def solid(moment: torch.Tensor, usage: torch.Tensor, ridge: float) -> torch.Tensor:
    """With the ridge that the package adds: relative to the mean energy of all."""
    energy = float(usage @ moment.diagonal(dim1=1, dim2=2).mean(1))
    return moment + ridge * energy * torch.eye(moment.shape[-1], dtype=moment.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "tiny-deepseek"], metavar="MODEL")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=4096, help="of each held-out text")
    arguments = parser.parse_args()
    texts = held_out_texts()
    for name in arguments.models:
        folder = local_folder(name)
        assert folder is not None
        original, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
        common: dict[str, Any] = {"merge": "soft", "routing_span": "all", "method": "camex", "base": "mean"}
        read: dict[str, Any] = {"calibration_tokens": arguments.calibration_tokens, "calibrate": "before"}
        curved = Recipe(**common, **read, curvature="calibrated")
        given = listen(original, text_for(curved, original.config.to_dict(), tokenizer).ids)
        before = perplexities(original, tokenizer, texts, arguments.tokens)
        table = Table(["", "cost", *before], [])
        for row, (fields, change, cost) in ROWS.items():
            recipe = Recipe(
                **common, **(read if set(fields) - {"align"} or fields["align"] != "none" else {}), **fields
            )
            model = patch_model(copy.deepcopy(original), recipe, tokenizer)
            if change is not None:
                form(model, given, change, curved.to_dict()["ridge"])
            after = perplexities(model, tokenizer, texts, arguments.tokens)
            table.rows.append([row, f"{cost:,}", *(f"{after[domain] / before[domain]:.2f}" for domain in before)])
        print("", name, "", *table.markdown(numbers=True), sep="\n", flush=True)


if __name__ == "__main__":
    main()
