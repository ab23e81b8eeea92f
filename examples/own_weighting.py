"""Merge by a weighting of your own, and compare it with equal weights: ``python examples/own_weighting.py``.

A weighting gets the Gram matrices K[i, j] = tau_i . tau_j of a group of experts, one for each of gate, up and down, and
gives each expert its share. This one keeps of each group the expert that is nearest to all others, whole.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from namex_hf import Recipe, patch_model, register_weighting
from namex_hf.checkpoint.resolve import resolve
from namex_hf.evaluation.perplexity import held_out_texts, perplexities
from namex_hf.merging.weightings import ExpertStatistics, Weights
from namex_hf.recipe import Game


def nearest(
    gram: torch.Tensor, game: Game, precision: torch.dtype, statistics: ExpertStatistics | None = None
) -> Weights:
    """All for one expert, the same one in every game. Args: as `namex_hf.merging.weightings.Weighting`."""
    lengths = gram.diagonal(dim1=1, dim2=2)
    distances = lengths[:, :, None] + lengths[:, None, :] - 2 * gram  # |tau_i - tau_j|^2
    games, count = gram.shape[:2]
    shares = torch.zeros(games, count, dtype=torch.float64)
    shares[:, distances.sum(dim=(0, 2)).argmin()] = 1
    return Weights(shares, ("nearest",) * games, (None,) * games, (None,) * games)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="tiny", help="a folder, a packaged model or a Hub id")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the experts that stays (default: 0.5)")
    options = parser.parse_args()

    register_weighting("nearest", nearest)
    folder = resolve(options.model).folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for weighting in ("uniform", "nearest"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        patch_model(model, Recipe(merge="grouped", keep=options.keep, weighting=weighting))
        found = perplexities(model, tokenizer, held_out_texts(), tokens=2048)
        print(f"{weighting}: perplexity {found['mean']:.3f}")


if __name__ == "__main__":
    main()
