"""Speed of a model in prefill and decoding, measured on this machine."""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from .loading import without_balance_loss

BATCH, PROMPT, NEW, REPEATS = 8, 128, 16, 3


@dataclass(frozen=True)
class Speed:
    """Tokens per second, over all sequences of the batch."""

    prefill: float
    """Prompt tokens, timed up to the first new token."""
    decode: float
    """New tokens after the first, greedily, with a cache."""


class Clock(StoppingCriteria):
    """Records the time of each new token; never stops generation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times = [self._now()]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        self.times.append(self._now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


@torch.no_grad()
def speed(
    model: Any, tokens: torch.Tensor, batch: int = BATCH, prompt: int = PROMPT, new: int = NEW, repeats: int = REPEATS
) -> Speed:
    """Speed of generating ``new`` tokens after prompts, as the median over repeats.

    Args:
        model: a causal language model of transformers, in eval mode.
        tokens: ``[n]`` ids, from which the prompts are cut; repeated if they are too few.
        new: at least 2; the end-of-text token does not stop generation.

    Raises:
        ValueError: no tokens, or ``new`` below 2.
    """
    if not len(tokens) or new < 2:
        raise ValueError(f"{len(tokens)} tokens, {new} new ones; needed: one, and 2")
    needed = batch * prompt
    ids = tokens.repeat(-(-needed // len(tokens)))[:needed].view(batch, prompt).to(model.device)
    mask, read, written = torch.ones_like(ids), [], []
    for _ in range(repeats):
        clock = Clock(model.device)
        with without_balance_loss(model):
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        start, first, *_, last = clock.times
        read.append(first - start)
        written.append(last - first)
    return Speed(needed / statistics.median(read), batch * (new - 1) / statistics.median(written))
