"""Patch a model in memory, then train it with the plain Trainer: ``python examples/patch_and_train.py``.

The Trainer needs accelerate, which the extra 'train' brings. The smaller model is a stock one: nothing of this package
takes part in its training, nor in opening what is saved.
"""

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from namex_hf import ProgressEvent, Recipe, patch_model
from namex_hf.checkpoint.resolve import resolve
from namex_hf.resources import PACKAGED

LENGTH = 128


def rows(tokenizer: Any, text: str) -> list[dict[str, torch.Tensor]]:
    """The text as sequences of `LENGTH` tokens, each its own label."""
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return [{"input_ids": row, "labels": row} for row in ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)]


def show(event: ProgressEvent) -> None:
    print(f"{event} ({event.done} of {event.total} layers done)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="tiny", help="a folder, a packaged model or a Hub id")
    parser.add_argument("--out", default="out/trained", help="folder of the result (default: out/trained)")
    parser.add_argument("--tokens", type=int, default=16384, help="of calibration text (default: 16384)")
    parser.add_argument("--steps", type=int, default=20, help="of training (default: 20)")
    options = parser.parse_args()

    folder = resolve(options.model).folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text, held_out = ((PACKAGED / kind / "prose.txt").read_text("utf-8") for kind in ("calibration", "held_out"))
    patch_model(model, Recipe(keep=0.5, calibration_tokens=options.tokens), tokenizer, texts=[text], progress=show)

    settings = {"report_to": "none", "save_strategy": "no", "dataloader_pin_memory": False}
    arguments = TrainingArguments(options.out, max_steps=options.steps, learning_rate=3e-4, **settings)
    data = {"train_dataset": rows(tokenizer, text), "eval_dataset": rows(tokenizer, held_out)[:32]}
    trainer = Trainer(model, arguments, **data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"loss on held-out prose: {before:.4f} patched, {trainer.evaluate()['eval_loss']:.4f} trained")
    trainer.save_model()
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
