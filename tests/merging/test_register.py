"""Weightings of other packages: registered by a call or an entry point, and folders of those that are gone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from namex_hf import Recipe, load_patched, patch_checkpoint, register_weighting
from namex_hf.errors import RecipeError, UsageError
from namex_hf.merging.weightings import WEIGHTINGS, ExpertStatistics, Weights
from namex_hf.recipe import choices
from namex_hf.record import Report
from tests.helpers.toy_models import save_toy

FIRST = {"merge": "grouped", "experts": 2, "weighting": "first"}
MODULE = """
from namex_hf import register_weighting
from namex_hf.merging.weightings import WEIGHTINGS
register_weighting("offered", WEIGHTINGS["uniform"], needs_text=True)
"""


def first(
    gram: torch.Tensor, game: object, precision: torch.dtype, statistics: ExpertStatistics | None = None
) -> Weights:
    """All for the first member of a group."""
    games, count = gram.shape[:2]
    values = torch.zeros(games, count, dtype=torch.float64)
    values[:, 0] = 1
    return Weights(values, ("first",) * games, (None,) * games, (None,) * games)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = dict(WEIGHTINGS), dict(choices.WEIGHTINGS)
    choices.load_offered.cache_clear()
    yield
    for table, entries in zip((WEIGHTINGS, choices.WEIGHTINGS), before, strict=True):
        table.clear()
        table.update(entries)  # type: ignore[arg-type]


def test_it_weighs_a_group_and_its_folder_opens_without_it(tmp_path: Path) -> None:
    model, out = save_toy(tmp_path / "model"), tmp_path / "out"
    with pytest.raises(RecipeError, match=r"'weighting' is 'first'; accepted: nash, uniform, usage, saliency"):
        Recipe(**FIRST)
    register_weighting("first", first)
    recipe = Recipe(**FIRST)
    report = patch_checkpoint(model, out, recipe)
    for layer in report.layers:
        assert {game["status"] for game in layer["games"]} == {"first"}
        assert all(game["weights"] == [1.0] + [0.0] * (len(game["members"]) - 1) for game in layer["games"])

    del WEIGHTINGS["first"], choices.WEIGHTINGS["first"]
    assert Report.from_file(out / "namex/report.json").run["recipe"]["weighting"] == "first"
    assert load_patched(out).config.namex["weighting"] == "first"
    stored = Recipe.from_yaml(out / "namex/recipe.yaml")
    assert stored.to_dict() == recipe.to_dict()
    with pytest.raises(RecipeError, match=r"'weighting' is 'first', which no installed package registers; accepted h"):
        patch_checkpoint(model, tmp_path / "again", stored)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("name", ["nash", "first"])
def test_a_name_is_taken_once(name: str) -> None:
    register_weighting("first", first)
    with pytest.raises(UsageError, match=f"weighting '{name}' is there already"):
        register_weighting(name, first)
    assert WEIGHTINGS["first"] is first


def test_entry_points_are_found_when_a_recipe_names_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = tmp_path / "other-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[namex_hf.weightings]\nother = other_weightings\n")
    (tmp_path / "other_weightings.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not Recipe(merge="grouped", experts=2, weighting="nash").needs_text
    assert "offered" not in WEIGHTINGS
    assert Recipe(merge="grouped", experts=2, weighting="offered").needs_text
