"""Word problems answered by generation, scored by the number after ``####``."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .generation import as_chat, generated_answers

PROBLEMS = Path(__file__).parent.parent / "packaged" / "held_out" / "arithmetic.jsonl"
ANSWER = re.compile(r"####\s*(-?[\d,]+)")


def held_out_problems() -> list[dict[str, str]]:
    """The packaged problems: ``question`` and worked ``answer``, with operands that no training text has."""
    return [json.loads(line) for line in PROBLEMS.read_text("utf-8").splitlines()]


def final_number(text: str) -> str | None:
    """The first number that follows ``####``."""
    match = ANSWER.search(text)
    return match[1].replace(",", "") if match else None


def asked(question: str) -> str:
    """The plain form in which a problem is asked, and in which the packaged models were trained."""
    return f"Question: {question}\nAnswer:"


def exact_answers(
    model: Any,
    tokenizer: Any,
    problems: Sequence[dict[str, str]],
    batch: int = 32,
    new_tokens: int = 110,
    chat: bool = False,
) -> list[bool]:
    """Whether the greedy response to each problem has the right number after ``####``.

    Args:
        model: a causal language model of transformers; its mode (training or eval) does not change.
        chat: use the tokenizer's chat template instead of ``Question: ... Answer:``.
    """
    questions = [problem["question"] for problem in problems]
    prompts = [as_chat(tokenizer, [("user", one)]) if chat else asked(one) for one in questions]
    found = generated_answers(model, tokenizer, prompts, new_tokens, batch, chat=chat)
    return [final_number(one.text) == final_number(p["answer"]) for one, p in zip(found, problems, strict=True)]
