"""Acceptance and divergence, against sums over the vocabulary, one entry at a time."""

import math
from typing import Any

import pytest
import torch

from namex_hf.evaluation import closeness
from namex_hf.evaluation.closeness import acceptance_and_divergence, window_closeness


def by_definition(original: torch.Tensor, result: torch.Tensor) -> tuple[list[float], list[float]]:
    """Of each token sum min(p, q) and sum p log(p / q), in Python's own floats."""
    accepted, diverged = [], []
    for row, other in zip(original.tolist(), result.tolist(), strict=True):
        p, q = ([math.exp(x) / sum(map(math.exp, each)) for x in each] for each in (row, other))
        accepted.append(sum(map(min, p, q)))
        diverged.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return accepted, diverged


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_equal_the_definition_in_chunks_of_any_size(monkeypatch: pytest.MonkeyPatch, chunk: int):
    monkeypatch.setattr(closeness, "CHUNK", chunk)
    draw = torch.Generator().manual_seed(0)
    original, result = (3 * torch.randn(7, 50, generator=draw) for _ in range(2))
    found = acceptance_and_divergence(original, result)
    for mine, right in zip(found, by_definition(original, result), strict=True):
        assert mine.dtype == torch.float64
        assert mine.tolist() == pytest.approx(right, rel=1e-5)


def test_by_hand():
    """p = (1/2, 1/2), q = (3/4, 1/4): 3/4 is accepted, and KL is 1/2 log 4/3. Distributions apart: nothing is."""
    p, q = torch.tensor([[0.5, 0.5], [1e-30, 1.0]]).log(), torch.tensor([[0.75, 0.25], [1.0, 1e-30]]).log()
    accepted, diverged = acceptance_and_divergence(p, q)
    assert accepted.tolist() == pytest.approx([0.75, 0.0], abs=1e-6)
    assert diverged.tolist() == pytest.approx([0.5 * math.log(4 / 3), 30 * math.log(10)], rel=1e-5)


def test_of_windows_of_a_text(model: Any):
    """Two models are read on the same windows; what fills no window is left out."""

    class Flat(torch.nn.Module):
        """Every token is as likely as any other."""

        device = model.device

        def __init__(self) -> None:
            super().__init__()
            self.get_input_embeddings = model.get_input_embeddings

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, model.config.vocab_size)})

    tokens = torch.randint(0, 256, (50,), generator=torch.Generator().manual_seed(3))
    accepted, diverged = window_closeness(model, Flat(), tokens, window=20)
    assert len(accepted) == len(diverged) == 2
    for place in range(2):
        with torch.no_grad():
            logits = model(input_ids=tokens[None, 20 * place : 20 * place + 20]).logits[0, :-1]
        right = by_definition(logits, torch.zeros_like(logits))
        assert accepted[place] == pytest.approx(sum(right[0]) / 19, rel=1e-5)
        assert diverged[place] == pytest.approx(sum(right[1]) / 19, rel=1e-4)


def test_a_model_is_as_itself(model: Any):
    accepted, diverged = window_closeness(model, model, torch.arange(40), window=16)
    assert accepted == pytest.approx([1.0, 1.0], abs=1e-6)
    assert diverged == [0.0, 0.0]
