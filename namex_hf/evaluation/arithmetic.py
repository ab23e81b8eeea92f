"""Word problems answered by generation, scored by the number after ``####``."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.tokenizer import check_ids
from ..errors import CheckpointError
from ..limited import limited
from .loading import without_balance_loss

PROBLEMS = Path(__file__).parent.parent / "packaged" / "held_out" / "arithmetic.jsonl"
ANSWER = re.compile(r"####\s*(-?[\d,]+)")


def held_out_problems() -> list[dict[str, str]]:
    """The packaged problems: ``question`` and worked ``answer``, with operands that no training text has."""
    return [json.loads(line) for line in PROBLEMS.read_text("utf-8").splitlines()]


def final_number(text: str) -> str | None:
    """The first number that follows ``####``."""
    match = ANSWER.search(text)
    return match[1].replace(",", "") if match else None


@torch.no_grad()
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
    tokenizer.padding_side = "left"
    training, right = model.training, []
    model.eval()
    for start in range(0, len(problems), batch):
        part = problems[start : start + batch]
        prompts = [_prompt(tokenizer, problem["question"], chat) for problem in part]
        # A chat template writes its own begin-of-text token.
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=not chat).to(model.device)
        check_ids(model, int(inputs.input_ids.max()))
        with without_balance_loss(model):
            output = model.generate(
                **inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        texts = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        right += [final_number(text) == final_number(p["answer"]) for text, p in zip(texts, part, strict=True)]
    model.train(training)
    return right


def _prompt(tokenizer: Any, question: str, chat: bool) -> str:
    if not chat:
        return f"Question: {question}\nAnswer:"
    turns = [{"role": "user", "content": question}]
    with limited("the tokenizer's chat template", CheckpointError):
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
