"""Tokens a second: what is run, and how it is counted."""

from typing import Any

import pytest
import torch

from namex_hf.evaluation.speed import Clock, speed


def test_prompts_and_new_tokens_are_as_many_as_said(model: Any):
    read: list[tuple[int, ...]] = []
    hook = model.model.register_forward_pre_hook(
        lambda _, given, named: read.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    model.generation_config.eos_token_id = list(range(259))  # whatever it would say ends the text
    try:
        found = speed(model, torch.arange(50), batch=2, prompt=32, new=5, repeats=3)
    finally:
        hook.remove()
        model.generation_config.eos_token_id = 256
    assert read == 3 * [(2, 32), *4 * [(2, 1)]]
    assert found.prefill > 0
    assert found.decode > 0


def test_the_clock_stops_nothing():
    clock = Clock(torch.device("cpu"))
    for _ in range(3):
        assert not clock(torch.zeros(2, 4, dtype=torch.long), None).any()
    assert len(clock.times) == 4
    assert clock.times == sorted(clock.times)


@pytest.mark.parametrize(("tokens", "new"), [(0, 5), (5, 1)])
def test_too_few(model: Any, tokens: int, new: int):
    with pytest.raises(ValueError, match=f"{tokens} tokens, {new} new ones; needed: one, and 2"):
        speed(model, torch.arange(tokens), new=new)
