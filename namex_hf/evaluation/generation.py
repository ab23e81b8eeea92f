"""Answers, and what is measured of one beside whether it is right: its length, whether it was cut, loops."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ..checkpoint.tokenizer import check_ids
from ..errors import CheckpointError
from ..limited import limited
from .loading import without_balance_loss

REPEATS, REPEATED = 3, 24
"""A loop is the same run of tokens so many times in a row or more, and at least so many tokens in all."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote."""

    text: str
    tokens: int
    """Without the one that ended it."""
    cut: bool
    """Whether the limit of tokens ended it."""
    loops: bool
    """Whether it ends in a loop."""


class LineEnd(StoppingCriteria):
    """Ends each answer that has a line break. Args: start: tokens of the prompts."""

    def __init__(self, tokenizer: Any, start: int) -> None:
        self.tokenizer, self.start = tokenizer, start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        return torch.tensor(["\n" in text for text in texts], device=input_ids.device)


@torch.no_grad()
def generated_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    new_tokens: int,
    batch: int = 32,
    *,
    chat: bool = False,
    one_line: bool = False,
    temperature: float | None = None,
) -> list[Answer]:
    """The answer to each prompt: greedy, or drawn by torch's own generator.

    Args:
        model: a causal language model of transformers; its mode (training or eval) does not change.
        tokenizer: with a token that fills batches; it is set to fill them on the left.
        chat: the prompts are written by the chat template, which writes its own begin-of-text token.
        one_line: an answer ends with its first line.
        temperature: of drawing; None: greedy.

    Raises:
        CheckpointError: the tokenizer gives a token that the embedding has no row for.
    """
    tokenizer.padding_side = "left"
    training, found = model.training, []
    model.eval()
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        inputs = tokenizer(part, return_tensors="pt", padding=True, add_special_tokens=not chat).to(model.device)
        check_ids(model, int(inputs.input_ids.max()))
        width = inputs.input_ids.shape[1]
        options: dict[str, Any] = {"do_sample": False}
        if temperature is not None:
            options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if one_line:
            options["stopping_criteria"] = StoppingCriteriaList([LineEnd(tokenizer, width)])
        with without_balance_loss(model):
            output = model.generate(**inputs, max_new_tokens=new_tokens, pad_token_id=tokenizer.pad_token_id, **options)
        found += [_answer(row.tolist(), model, tokenizer, new_tokens, one_line) for row in output[:, width:]]
    model.train(training)
    return found


def _answer(ids: list[int], model: Any, tokenizer: Any, new_tokens: int, one_line: bool) -> Answer:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    text = tokenizer.decode(ids, skip_special_tokens=True)
    count = next((place for place, one in enumerate(ids) if one in ends), len(ids))
    ended = count < len(ids)
    if one_line and "\n" in text:
        text, ended = text.partition("\n")[0], True
        count = next((n for n in range(count) if "\n" in tokenizer.decode(ids[: n + 1])), count)
    return Answer(text, count, not ended and len(ids) >= new_tokens, has_loop(ids[:count]))


def has_loop(ids: Sequence[int]) -> bool:
    """Whether tokens end in a loop: `REPEATS` times the same run of one token or more, `REPEATED` tokens in all."""
    for period in range(1, len(ids) // REPEATS + 1):
        size = max(REPEATS * period, REPEATED)
        if size <= len(ids) and ids[-size:-period] == ids[len(ids) - size + period :]:
            return True
    return False


def as_chat(tokenizer: Any, turns: Sequence[tuple[str, str]]) -> str:
    """Turns of role and content as the tokenizer's chat template writes them, up to where the answer begins.

    Raises:
        CheckpointError: the template fails or takes too long.
    """
    messages = [{"role": role, "content": content} for role, content in turns]
    with limited("the tokenizer's chat template", CheckpointError):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
