"""Merge by a weighting of your own, and compare it with equal weights: ``python examples/own_weighting.py``.

A weighting gets the Gram matrices of the games of a layer, K[i, j] = tau_i . tau_j over the experts of a group, and
gives each expert its share. This one gives more to experts that differ less from the others.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from namex_hf import Recipe, patch_model, register_weighting
from namex_hf.checkpoint.resolve import resolve
from namex_hf.evaluation.perplexity import held_out_texts, perplexities
from namex_hf.merging.weightings import ExpertStatistics, Weights
from namex_hf.recipe import Game


def central(
    gram: torch.Tensor, game: Game, precision: torch.dtype, statistics: ExpertStatistics | None = None
) -> Weights:
    """Shares by the mean cosine to all experts of the group. Args: as `namex_hf.merging.weightings.Weighting`."""
    norms = gram.diagonal(dim1=1, dim2=2).sqrt().clamp_min(1e-30)
    cosines = gram / (norms[:, :, None] * norms[:, None, :])
    shares = cosines.mean(dim=2).clamp_min(1e-6)
    games = len(gram)
    return Weights(shares / shares.sum(dim=1, keepdim=True), ("central",) * games, (None,) * games, (None,) * games)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="tiny", help="a folder, a packaged model or a Hub id")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the experts that stays (default: 0.5)")
    options = parser.parse_args()

    register_weighting("central", central)
    folder = resolve(options.model).folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for weighting in ("uniform", "central"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        patch_model(model, Recipe(merge="grouped", keep=options.keep, weighting=weighting))
        found = perplexities(model, tokenizer, held_out_texts(), tokens=2048)
        print(f"{weighting}: perplexity {found['mean']:.3f}")


if __name__ == "__main__":
    main()
