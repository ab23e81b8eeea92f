"""What a trained curvature is worth under ``soft``: ``python benchmarks/curvature_training.py [--steps 400]``.

The packaged model under ``merge: soft`` is trained on the packaged calibration text: the Kronecker curvature alone at
two ranks, and everything with and without it. Perplexity of the packaged held-out text, the numbers that train, and
perplexity again with the curvature folded into the experts.
"""

import argparse
from typing import Any

import torch
from stable_training import LENGTH, train
from transformers import AutoTokenizer, Trainer

from namex_hf import Recipe, patch_model
from namex_hf.calibration.text import calibration_text
from namex_hf.checkpoint.resolve import local_folder
from namex_hf.evaluation.loading import load
from namex_hf.evaluation.perplexity import held_out_texts, perplexities
from namex_hf.evaluation.table import Table
from namex_hf.training.fold import fold_curvature

# Name, fields of the recipe, whether all parameters train (None: nothing does), learning rate.
ROWS: tuple[tuple[str, dict[str, Any], bool | None, float], ...] = (
    ("not trained", {}, None, 0.0),
    ("curvature alone, rank 1", {"curvature": "kronecker"}, False, 3e-3),
    ("curvature alone, rank 4", {"curvature": "kronecker", "rank": 4}, False, 3e-3),
    ("everything, no curvature", {}, True, 3e-4),
    ("everything, curvature of rank 1", {"curvature": "kronecker"}, True, 3e-4),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", choices=["tiny", "tiny-deepseek"])
    parser.add_argument("--steps", type=int, default=400, help="of the optimiser")
    parser.add_argument("--batch", type=int, default=8, help=f"sequences of {LENGTH} tokens a step")
    parser.add_argument("--tokens", type=int, default=262144, help="of calibration text that is trained on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = local_folder(options.model)
    assert folder is not None
    tokenizer, texts = AutoTokenizer.from_pretrained(folder), held_out_texts()
    rows = calibration_text("packaged", tokenizer, options.tokens, LENGTH, options.seed).ids
    table = Table(["", "trained", *texts, "mean", "folded"], [])
    for name, fields, everything, rate in ROWS:
        torch.manual_seed(options.seed)
        model, options.learning_rate = (
            patch_model(load(folder), Recipe(merge="soft", routing_span="all", **fields)),
            rate,
        )
        for part, parameter in model.named_parameters():
            parameter.requires_grad_(bool(everything) or (everything is False and ".curvature." in part))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if trained:
            train(Trainer, model, rows, options)
        found = perplexities(model, tokenizer, texts, 8192)
        folded = ""
        if "curvature" in fields:
            folded = f"{perplexities(fold_curvature(model), tokenizer, texts, 8192)['mean']:.2f}"
        table.rows.append([name, f"{trained:,}", *(f"{found[domain]:.2f}" for domain in (*texts, "mean")), folded])
    title = f"{options.model}, soft: perplexity after {options.steps} steps"
    print("", title, "", *table.markdown(numbers=True), sep="\n")


if __name__ == "__main__":
    main()
