"""Perplexity against its definition."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from namex_hf.commands import patch
from namex_hf.evaluation.perplexity import before_and_after, held_out_texts, perplexities, perplexity

DOMAINS = ["arithmetic", "code", "dictionary", "manual", "prose"]


def by_definition(model: Any, tokens: torch.Tensor, window: int) -> float:
    """exp(-mean log p(token | those before it in its window)), token by token, in float64."""
    losses = []
    for start in range(0, len(tokens) - window + 1, window):
        ids = tokens[start : start + window]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].double()
        losses += [-float(logits[i].log_softmax(-1)[ids[i + 1]]) for i in range(window - 1)]
    return math.exp(sum(losses) / len(losses))


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("window", "batch"), [(100, 8), (32, 8), (7, 3), (2, 100), (99, 1)])
def test_equals_the_definition(model: Any, tokens: torch.Tensor, window: int, batch: int):
    assert perplexity(model, tokens, window, batch) == pytest.approx(by_definition(model, tokens, window), rel=1e-5)


def test_a_text_shorter_than_the_window_is_one_window(model: Any, tokens: torch.Tensor):
    assert perplexity(model, tokens, 512) == pytest.approx(by_definition(model, tokens, 100), rel=1e-5)


def test_what_fills_no_window_is_left_out(model: Any, tokens: torch.Tensor):
    assert perplexity(model, tokens, 48) == perplexity(model, tokens[:96], 48)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_tokens(model: Any, tokens: torch.Tensor, count: int):
    with pytest.raises(ValueError, match=f"{count} tokens; at least 2"):
        perplexity(model, tokens[:count])


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(model: Any, tokens: torch.Tensor, training: bool):
    model.train(training)
    perplexity(model, tokens[:20])
    assert model.training is training
    model.eval()


def test_of_several_texts(model: Any, tokenizer: Any):
    texts = {"a": "the quick brown fox", "b": "0123456789" * 3}
    found = perplexities(model, tokenizer, texts, window=8)
    assert list(found) == ["a", "b", "mean"]
    for name, text in texts.items():
        ids = torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)
        assert len(ids) == len(text)
        assert found[name] == pytest.approx(by_definition(model, ids, 8), rel=1e-5)
    assert found["mean"] == pytest.approx(math.sqrt(found["a"] * found["b"]))
    beginning = {name: text[:9] for name, text in texts.items()}
    assert perplexities(model, tokenizer, texts, tokens=9, window=8) == perplexities(
        model, tokenizer, beginning, window=8
    )


def test_held_out_texts_are_there_and_small():
    texts = held_out_texts()
    assert list(texts) == DOMAINS
    sizes = [len(text.encode()) for text in texts.values()]
    assert all(size > 50_000 for size in sizes)
    assert sum(sizes) < 1_000_000


def test_before_and_after(folder: Path, model: Any, tokenizer: Any, tmp_path: Path):
    assert patch.main([str(folder), "--out", str(tmp_path / "same"), "--method", "smoe", "--quiet"]) == 0
    assert patch.main([str(folder), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    same, patched = before_and_after(folder, tmp_path / "same", 64), before_and_after(folder, tmp_path / "out", 64)
    assert list(same) == [*DOMAINS, "mean"]
    expected = perplexities(model, tokenizer, held_out_texts(), 64)
    for domain, value in same.items():
        assert value["before"] == value["after"] == patched[domain]["before"]
        assert value["before"] == pytest.approx(expected[domain], rel=1e-5)
    assert any(value["before"] != value["after"] for value in patched.values())
