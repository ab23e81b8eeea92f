"""Losses on labelled tokens against the model's own, a row at a time and without padding."""

from typing import Any

import pytest
import torch

from namex_hf.evaluation.perplexity import IGNORED, labelled_losses
from namex_hf.models.convert import patch_classes
from namex_hf.models.routers import StableRouter
from tests.helpers.toy_models import COMMON, FAMILIES, toy_model

PAD = 256
RECIPES: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "residual": {"merge": "residual"},
    "soft": {"merge": "soft", "segment": 4},
    "stable": {"merge": "residual", "routing": "stable"},
}
LENGTHS = (7, 23, 2, 16, 23, 9, 31, 5, 3, 12, 8)


def make(family: str, recipe: str = "stock", **changes: Any) -> Any:
    """A random model that drops attention in training, and so shows in which mode it was asked."""
    made = toy_model(family, attention_dropout=0.5, **changes)
    if RECIPES[recipe] is not None:
        patch_classes(made, dict(RECIPES[recipe] or {}))
    for router in (module for module in made.modules() if isinstance(module, StableRouter)):
        router.assignment.copy_(torch.rand(COMMON["vocab_size"], 8).argsort(1)[:, :3])
    return made.eval()


def random_rows(lengths=LENGTHS) -> list[dict[str, list[int]]]:
    """Half of the tokens labelled, the last always; beside them a column that is none of ours."""
    draw = torch.Generator().manual_seed(2)
    rows = []
    for length in lengths:
        ids = torch.randint(0, 250, (length,), generator=draw)
        silent = torch.rand(length, generator=draw) < 0.5
        silent[-1] = False
        labels = ids.masked_fill(silent, IGNORED)
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist(), "seq_lengths": [length]})
    return rows


@torch.no_grad()
def own_losses(model: Any, rows: list[dict[str, list[int]]]) -> torch.Tensor:
    """transformers' loss of each row alone."""
    one_by_one = [
        model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss for row in rows
    ]
    return torch.stack(one_by_one).double()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_models_own_loss_row_by_row(family: str, recipe: str, training: bool):
    model, rows = make(family, recipe), random_rows()
    expected = own_losses(model, rows)
    model.train(training)
    found = labelled_losses(model, rows, PAD)
    assert model.training is training
    assert all(module.training is training for module in model.modules())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.std() > 0.1


@pytest.mark.parametrize("batch", [1, 2, 3, 11, 64])
def test_how_many_rows_go_together_changes_nothing(batch: int):
    model, rows = make("qwen2_moe", "soft"), random_rows()
    torch.testing.assert_close(labelled_losses(model, rows, PAD, batch), own_losses(model, rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recipe", ["soft", "stable"])
def test_what_padding_is_filled_with_changes_nothing(recipe: str):
    model, rows = make("deepseek", recipe), random_rows()
    torch.testing.assert_close(labelled_losses(model, rows, 0), labelled_losses(model, rows, PAD), atol=1e-5, rtol=1e-5)


def test_what_the_trainer_has_switched_on_does_not_count():
    """The auxiliary loss is of training, and the cache of generation."""
    rows = random_rows()
    plain, other = make("qwen2_moe"), make("qwen2_moe", output_router_logits=True, router_aux_loss_coef=5.0)
    other.config.use_cache = False
    assert (own_losses(plain, rows) - own_losses(other, rows)).abs().min() > 1
    assert torch.equal(labelled_losses(plain, rows, PAD), labelled_losses(other, rows, PAD))


def test_in_bfloat16_the_loss_is_still_taken_in_float32():
    model, rows = make("qwen2_moe").to(torch.bfloat16), random_rows([20, 20])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row["input_ids"] for row in rows])).logits.double()
    expected = []
    for row, one in zip(rows, logits.log_softmax(-1), strict=True):
        labelled = [place for place in range(1, 20) if row["labels"][place] != IGNORED]
        expected.append(-sum(float(one[place - 1, row["labels"][place]]) for place in labelled) / len(labelled))
    assert labelled_losses(model, rows, PAD).tolist() == pytest.approx(expected, rel=1e-5)


def test_the_label_of_a_rows_first_token_is_nobodys():
    """Nothing comes before it that could foretell it."""
    model, rows = make("qwen2_moe"), random_rows([9, 12])
    rows[0]["labels"][0], rows[1]["labels"][0] = rows[0]["input_ids"][0], IGNORED
    without = [{**row, "labels": [IGNORED, *row["labels"][1:]]} for row in rows]
    assert torch.equal(labelled_losses(model, rows, PAD), labelled_losses(model, without, PAD))


def test_no_gradient_is_kept():
    model = make("qwen2_moe")
    assert not labelled_losses(model, random_rows([5, 6]), PAD).requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
