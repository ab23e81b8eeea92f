"""The recipe of a model that is trained beside another, over every recipe of this repository."""

from pathlib import Path
from typing import Any

import pytest

from namex_hf.recipe import Recipe, read_yaml
from namex_hf.training import run
from namex_hf.training.arguments import COMPARED, read
from namex_hf.training.rivals import left_out, rival

ROOT = Path(__file__).parents[2]
FOLDERS = ("patches", "benchmarks/recipes", "eval/recipes", "experiments")
FILES = sorted(file for folder in FOLDERS for file in ROOT.glob(f"{folder}/**/*.yaml"))
METHODS = tuple(COMPARED.values())
ROUTER = ("routing", "temperature")
TEXT = ("calibration_data", "calibration_tokens", "calibrate", "seed")
BARGAIN = ("disagreement", "granularity", "scale", "solver", "ccp_iterations", "metric", "power", "every")
"""Fields of NAMEx-Full that no other method has; NAMEx has all but ``every``."""


def recipe_of(file: Path) -> Recipe:
    """With what a grouped one is given on the command line."""
    fields = read_yaml(file)
    return Recipe(**({"experts": 8, "fit": "layer"} if fields["merge"] == "grouped" else {}) | fields)


def expected(recipe: Recipe, method: str) -> Recipe:
    """By method: SMoE has a router alone, EP-CAMEx no bargain, CAMEx no propagation either, and no groups but these."""
    found: dict[str, Any] = {name: recipe.to_dict()[name] for name in ROUTER}
    if method == "smoe" or (recipe.merge.kind == "grouped" and method != "ep-camex"):
        reads = recipe.routing.kind == "stable" or recipe.to_dict()["temperature"] == "entropy"
        found |= {name: recipe.to_dict()[name] for name in TEXT} if reads else {}
        found |= {"disagreement": recipe.to_dict()["disagreement"]} if method == "namex" else {}
        return Recipe(method=method, **found)
    gone = ("weighting", "every") if method == "namex" else ("weighting", *BARGAIN)
    if recipe.to_dict()["operator"] != "merge":
        gone += ("operator", *(["grouping"] if recipe.to_dict()["grouping"] == "none" else []))
    fields = {name: value for name, value in recipe.to_dict().items() if name not in gone}
    return Recipe(**fields | {"method": method})


@pytest.mark.parametrize(("words", "seed"), [((), 42), (("--data_seed", "0"), 0), (("--seed", "3"), 3)])
def test_chats_are_chosen_by_a_seed_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Any, seed: int
):
    class Chosen(Exception):
        pass

    def chosen(*arguments: Any) -> None:
        raise Chosen(arguments[-1])

    monkeypatch.setattr(run, "load_chats", chosen)
    with pytest.raises(Chosen, match=f"^{seed}$"):
        run.run(*read(["--output_dir", str(tmp_path), *words], "namex tune", ""))


def test_there_are_recipes_of_every_kind():
    found = [recipe_of(file) for file in FILES]
    assert METHODS == ("smoe", "ep-camex", "namex", "camex")
    assert len(found) > 60
    for field, values in (
        ("merge", {"residual", "soft", "grouped"}),
        ("routing", {"linear", "cosine", "stable"}),
        ("disagreement", {"zero", "mean"}),
        ("operator", {"merge", "keep", "random", "shared"}),
        ("metric", {"euclidean", "calibrated"}),
    ):
        assert {recipe.to_dict()[field] for recipe in found} == values


@pytest.mark.parametrize("method", METHODS)
def test_every_recipe_of_the_repository_has_a_rival(method: str):
    for file in FILES:
        recipe = recipe_of(file)
        assert rival(recipe, method) == expected(recipe, method), file


@pytest.mark.parametrize(
    ("fields", "method", "rest", "gone"),
    [
        ({"disagreement": "mean"}, "ep-camex", {}, {"disagreement": "mean"}),
        ({"solver": "ccp", "ccp_iterations": 20}, "ep-camex", {}, {"solver": "ccp", "ccp_iterations": 20}),
        ({"scale": "lemma", "gamma": 3.0}, "ep-camex", {"gamma": 3.0}, {"scale": "lemma"}),
        ({"granularity": "expert"}, "camex", {}, {"granularity": "expert"}),
        ({"every": 5, "granularity": "expert"}, "namex", {"granularity": "expert"}, {"every": 5}),
        (
            {"momentum": "complex", "beta": "0.9,0.26", "gamma": 2.0, "base": "mean", "merge": "soft", "eta": 0.5},
            "camex",
            {"base": "mean", "merge": "soft", "eta": 0.5},
            {"gamma": 2.0, "momentum": "complex", "beta": "0.9,0.26"},
        ),
        (
            {
                "routing": "cosine",
                "temperature": "entropy",
                "calibration_tokens": 512,
                "seed": 3,
                "disagreement": "mean",
            },
            "smoe",
            {"routing": "cosine", "temperature": "entropy", "calibration_tokens": 512, "seed": 3},
            {"disagreement": "mean"},
        ),
    ],
)
def test_fields_that_a_method_does_not_have_are_dropped_and_named(
    fields: dict[str, Any], method: str, rest: dict[str, Any], gone: dict[str, Any]
):
    recipe = Recipe(**fields)
    found = rival(recipe, method)
    assert found == Recipe(method=method, **rest)
    assert left_out(recipe, found) == gone
