"""Calibrate on texts and chats of your own, from Python: ``python examples/own_text.py``.

The same recipe halves one model twice: on code, and on chats. Each result does better on text like its own.
"""

import argparse
import json
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from namex_hf import Recipe, patch_model
from namex_hf.checkpoint.resolve import resolve
from namex_hf.evaluation.perplexity import perplexities
from namex_hf.resources import PACKAGED


def chats(name: str) -> list[Any]:
    """The packaged chats, each a list of messages."""
    lines = (PACKAGED / "chats" / f"{name}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="tiny", help="a folder, a packaged model or a Hub id")
    parser.add_argument("--tokens", type=int, default=16384, help="of calibration text (default: 16384)")
    options = parser.parse_args()

    code = (PACKAGED / "calibration" / "code.txt").read_text("utf-8")
    own: dict[str, list[Any]] = {"code": code.split("\n\n\n"), "chats": chats("train")}

    folder = resolve(options.model).folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held_out = {
        "code": (PACKAGED / "held_out" / "code.txt").read_text("utf-8"),
        "chats": "".join(tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats("held_out")),
    }
    for name, texts in own.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        patch_model(model, Recipe(keep=0.5, calibration_tokens=options.tokens), tokenizer, texts=texts)
        found = perplexities(model, tokenizer, held_out, tokens=8192)
        print(f"calibrated on {name}: perplexity {found['code']:.2f} on code, {found['chats']:.2f} on chats")


if __name__ == "__main__":
    main()
