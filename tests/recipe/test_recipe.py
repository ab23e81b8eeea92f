"""The recipe: values, refusals, the validity table, YAML."""

from dataclasses import FrozenInstanceError
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from namex_hf.errors import NamexError, RecipeError
from namex_hf.models.configuration_namex import soft_choice
from namex_hf.recipe import FIELDS as SPECS
from namex_hf.recipe import Recipe, read_yaml, refusals
from namex_hf.recipe.recipe import VERSION

GROUPED = {"merge": "grouped", "experts": 4}
SOFT = {"merge": "soft"}
NARROW = {"merge": "narrow", "width": 8}
FITTED = {**GROUPED, "fit": "router"}
KEPT = {**GROUPED, "operator": "keep"}
REFITTED = {**GROUPED, "down": "refit"}
CURVED = {**SOFT, "curvature": "calibrated"}
KRONECKER = {**SOFT, "curvature": "kronecker"}
COSINE = {"routing": "cosine"}
STABLE = {"routing": "stable"}
RULES = refusals()
CHOICES = [(name, choice) for name, spec in SPECS.items() for choice in spec.choices]
# What a value needs around it to mean something.
AROUND: dict[str, dict[str, Any]] = {
    "grouped": {"experts": 4},
    "narrow": {"width": 8},
    "energy": NARROW,
    "uniform": GROUPED,
    "nash": GROUPED,
    "previous": SOFT,
    "prompt": SOFT,
    "smear": SOFT,
    "loss": {**FITTED, "metric": "calibrated"},
    "before": FITTED,
    "source": FITTED,
    "sequence": NARROW,
    "keep": GROUPED,
    "random": FITTED,
    "kronecker": SOFT,
    "norms": COSINE,
    "entropy": COSINE,
}
# What a value of one field needs, where the same word is a value of another.
AROUND_FIELD: dict[tuple[str, str], dict[str, Any]] = {
    ("metric", "calibrated"): FITTED,
    ("neurons", "random"): NARROW,
    ("neurons", "gradient"): NARROW,
    ("operator", "shared"): FITTED,
    ("budget", "damage"): FITTED,
    ("grouping", "none"): KEPT,
    ("target", "layer"): FITTED,
    ("target", "model"): FITTED,
    **{("routing_span", span): SOFT for span in ("token", "all", "previous", "prompt")},
}
OF_GROUPED = ("fit", "grouping", "curvature", "align", "down", "weighting", "power")
VALUES = [
    ("experts", 1, {"merge": "grouped"}),
    ("experts", 60, {"merge": "grouped"}),
    ("width", 1, {"merge": "narrow"}),
    ("width", 1 << 20, {"merge": "narrow"}),
    ("sweeps", 0, NARROW),
    ("sweeps", 100, NARROW),
    ("keep", 0.5, {"merge": "narrow"}),
    ("keep", 0.5, {"merge": "grouped", "fit": "router"}),
    ("keep", 0.01, {}),
    ("base", "shared", {}),
    ("base", "first", {}),
    ("base", "mean", {}),
    ("base", "index:0", {}),
    ("base", "index:59", {}),
    ("gamma", 0.5, {}),
    ("gamma", 2, {}),
    ("every", 1, {}),
    ("every", 24, {}),
    ("seed", 0, {}),
    ("seed", 17, GROUPED),
    ("seed", 17, CURVED),
    ("seed", 17, NARROW),
    ("fit", "layer", NARROW),
    ("seed", 17, {**SOFT, "align": "weights"}),
    ("seed", 17, KRONECKER),
    ("seed", 17, STABLE),
    ("seed", 17, {**COSINE, "temperature": "entropy"}),
    ("rank", 1, CURVED),
    ("rank", 16, CURVED),
    ("rank", 2, KRONECKER),
    ("rank", 2, {**KRONECKER, **STABLE}),
    ("align", "none", CURVED),
    ("align", "weights", CURVED),
    ("align", "none", SOFT),
    ("align", "weights", SOFT),
    ("align", "activations", SOFT),
    ("curvature", "identity", SOFT),
    ("eta", 0.5, SOFT),
    ("eta", 1.5, SOFT),
    ("eta", 1.5, {**SOFT, "align": "activations"}),
    ("eta", 1.0, CURVED),
    ("eta", 1.5, KRONECKER),
    ("align", "activations", KRONECKER),
    ("temperature", "norms", {**COSINE, **FITTED}),
    ("temperature", "entropy", {**COSINE, "method": "smoe"}),
    ("segment", 16, SOFT),
    ("renormalise", True, SOFT),
    ("top_k", 2, SOFT),
    ("beta", "0.9", {"momentum": "complex"}),
    ("beta", "0.9,0.2618", {"momentum": "complex"}),
    ("beta", "0.8,0.3,0.3,0.3", {"momentum": "quaternion"}),
    ("ccp_iterations", 2, {}),
    ("ccp_iterations", 60, {"solver": "ccp"}),
    ("ccp_iterations", 2, {"solver": "ccp", "method": "namex"}),
    ("fit_steps", 50, FITTED),
    ("fit_steps", 50, {**NARROW, "fit": "layer"}),
    ("ridge", 0.1, {**GROUPED, "curvature": "diagonal"}),
    ("ridge", 0.1, {**GROUPED, "down": "refit"}),
    ("ridge", 0.1, CURVED),
    ("calibration_data", "some/where", FITTED),
    ("calibration_data", "some/where", CURVED),
    ("calibration_data", "some/where", {**SOFT, "align": "weights"}),
    ("calibration_tokens", 4096, CURVED),
    ("calibrate", "before", {**SOFT, "align": "activations"}),
    ("calibration_tokens", 4096, {**GROUPED, "grouping": "outputs"}),
    ("calibration_tokens", 4096, STABLE),
    ("calibration_tokens", 4096, {**STABLE, "method": "smoe"}),
    ("calibration_data", "some/where", {**STABLE, **GROUPED}),
    ("calibrate", "before", STABLE),
    ("calibration_tokens", 4096, NARROW),
    ("calibrate", "before", NARROW),
    ("routing", "cosine", NARROW),
    ("calibrate", "before", {**COSINE, "temperature": "entropy", "method": "smoe"}),
    ("device", "cuda", {}),
]


def field_of(recipe: Recipe, name: str) -> Any:
    """A field by its flat name."""
    return recipe.device if name == "device" else recipe.to_dict()[name]


def test_the_default_is_namex_full_in_residual_form():
    recipe, flat = Recipe(), Recipe().to_dict()
    assert (flat["merge"], flat["method"], flat["routing"]) == ("residual", "namex-full", "linear")
    assert (flat["disagreement"], recipe.merge.weights_by, flat["base"]) == ("zero", "nash", "shared")


def test_namex_spends_the_budget_of_the_procedure_in_its_one_layer():
    """A stored recipe states the number, so an older one keeps its 2."""
    found = {
        method: field_of(Recipe(method=method, solver="ccp"), "ccp_iterations") for method in ("namex-full", "namex")
    }
    assert found == {"namex-full": 2, "namex": 20}
    assert Recipe().to_dict()["ccp_iterations"] == Recipe(method="namex").to_dict()["ccp_iterations"] == 2


def test_beta_may_be_a_number_and_a_quaternion_becomes_complex(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("momentum: complex\nbeta: 0.5\n")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == Recipe(momentum="complex", beta="0.5")
    assert Recipe(momentum="complex", beta="0.5").merge.propagation.complex_beta == 0.5
    assert Recipe(momentum="quaternion").merge.propagation.complex_beta == pytest.approx(0.8 + 0.27**0.5 * 1j)
    assert Recipe().merge.propagation.complex_beta == 0


@pytest.mark.parametrize(
    ("fields", "span", "segment"),
    [
        ({}, "token", None),
        ({"method": "smear"}, "token", None),
        ({"curvature": "kronecker"}, "token", None),
        ({"curvature": "calibrated"}, "all", 64),
        ({"segment": 16}, "all", 16),
        ({"segment": 16, "routing_span": "prompt"}, "prompt", 16),
        ({"routing_span": "previous"}, "previous", 64),
    ],
)
def test_spans_by_default(fields: dict[str, Any], span: str, segment: int | None):
    """A patched configuration reads a recipe without defaults alike."""
    recipe = Recipe(merge="soft", **fields)
    assert (field_of(recipe, "routing_span"), field_of(recipe, "segment")) == (span, segment)
    choice = soft_choice({"merge": "soft", **fields})
    assert choice is not None
    assert choice == soft_choice(recipe.to_dict())
    assert (choice.span, choice.segment) == (span, segment)


@pytest.mark.parametrize("fields", [{}, GROUPED, {"method": "smoe"}, {"method": "camex"}])
def test_spans_that_older_releases_stored_under_every_merge(fields: dict[str, Any]):
    assert Recipe.from_dict({**fields, "routing_span": "all", "segment": 64}) == Recipe.from_dict(fields)


def test_a_recipe_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        Recipe().gamma = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(("name", "choice"), CHOICES)
def test_every_choice_is_accepted(name: str, choice: str):
    around = AROUND_FIELD.get((name, choice), AROUND.get(choice, GROUPED if name in OF_GROUPED else {}))
    assert field_of(Recipe.from_dict({**around, name: choice}), name) == choice


@pytest.mark.parametrize(("name", "value", "around"), VALUES)
def test_every_plain_field_accepts(name: str, value: Any, around: dict[str, Any]):
    assert field_of(Recipe.from_dict({**around, name: value}), name) == value


def test_no_field_is_left_out_here():
    assert {name for name, _ in CHOICES} | {name for name, _, _ in VALUES} == set(SPECS)


@pytest.mark.parametrize("name", sorted({name for name, _ in CHOICES}))
@pytest.mark.parametrize("value", ["no-such-value", 3, True, ["zero"], {}, 0.5])
def test_unknown_choices_are_answered_with_the_accepted_ones(name: str, value: Any):
    with pytest.raises(RecipeError) as error:
        Recipe.from_dict({name: value})
    assert f"'{name}'" in str(error.value)
    assert repr(value) in str(error.value)
    for choice in SPECS[name].choices:
        assert choice in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("experts", 0, "a whole number from 1"),
        ("experts", -3, "a whole number from 1"),
        ("experts", 4.0, "int"),
        ("experts", "4", "int"),
        ("experts", True, "int"),
        ("width", 0, "a whole number from 1"),
        ("width", (1 << 20) + 1, "a whole number from 1"),
        ("width", 4.0, "int"),
        ("every", 0, "a whole number from 1"),
        ("every", None, "int"),
        ("gamma", 0.0, "a number above 0"),
        ("gamma", -1, "a number above 0"),
        ("gamma", float("nan"), "float"),
        ("gamma", float("inf"), "float"),
        ("gamma", float("-inf"), "float"),
        ("gamma", 10**400, "float"),
        ("gamma", "1", "float"),
        ("gamma", None, "float"),
        ("seed", 1.5, "int"),
        ("seed", None, "int"),
        ("seed", -1, "a whole number from 0"),
        ("seed", 2**64, "a whole number from 0"),
        ("base", 3, "str"),
        ("base", "last", "shared, first, mean, index:K"),
        ("base", "index:", "shared, first, mean, index:K"),
        ("base", "index:-1", "shared, first, mean, index:K"),
        ("base", "index:one", "shared, first, mean, index:K"),
        ("base", "index:" + "9" * 5000, "shared, first, mean, index:K"),
        ("eta", 0, "a number above 0"),
        ("segment", 0, "a whole number from 1"),
        ("top_k", 0, "a whole number from 1"),
        ("top_k", "2", "int"),
        ("rank", 0, "a whole number from 1"),
        ("rank", -1, "a whole number from 1"),
        ("rank", 4.0, "int"),
        ("rank", True, "int"),
        ("beta", "1.0", "a modulus below 1"),
        ("beta", "0.9;0.2", "0.9,0.2618"),
        ("beta", "0.8,0.3,0.3,0.3", "0.9,0.2618"),
        ("beta", True, "str"),
        ("ccp_iterations", 0, "a whole number from 1"),
        ("fit_steps", 0, "a whole number from 1"),
        ("calibration_tokens", 0, "a whole number from 1"),
        ("calibration_data", 3, "str"),
        ("ridge", 0, "a number above 0"),
        ("device", 0, "str"),
    ],
)
def test_bad_values_are_answered_with_field_and_what_is_accepted(name: str, value: Any, accepted: str):
    neighbours: dict[str, dict[str, Any]] = {
        "seed": GROUPED,
        "experts": {"merge": "grouped"},
        "width": {"merge": "narrow"},
        "beta": {"momentum": "complex"},
    }
    neighbours |= {"eta": SOFT, "segment": SOFT, "top_k": SOFT, "rank": CURVED}
    around = neighbours.get(name, {})
    with pytest.raises(RecipeError) as error:
        Recipe.from_dict({**around, name: value})
    assert f"'{name}'" in str(error.value)
    assert "accept" in str(error.value)
    assert accepted in str(error.value)


@pytest.mark.parametrize("name", ["metod", "", "Merge", "curvatures", 7, None])
def test_unknown_fields_are_answered_with_the_known_ones(name: Any):
    with pytest.raises(RecipeError) as error:
        Recipe.from_dict({name: 1})
    assert f"unknown recipe field '{name}'" in str(error.value)
    for known in SPECS:
        assert known in str(error.value)


# What belongs to a walk of the base expert or to a bargain.
WALK_OR_BARGAIN: dict[str, Any] = {
    **{"gamma": 0.5, "momentum": "complex", "every": 2, "disagreement": "mean", "granularity": "expert"},
    **{"scale": "lemma", "solver": "ccp", "beta": "0.5", "ccp_iterations": 5},
}
# A recipe for each line of the validity table that breaks that line.
BROKEN: dict[str, dict[str, Any]] = {
    "merge 'grouped' needs 'experts'": {"merge": "grouped"},
    "merge 'narrow' needs 'width'": {"merge": "narrow"},
    "merge 'narrow' keeps every expert": {"method": "namex-full", **NARROW},
    "merge 'narrow' keeps the router": {"fit": "router", **NARROW},
    "'width' belongs": {"width": 8},
    "'keep' belongs": {"keep": 0.5, "merge": "residual"},
    "'error_weights' belongs": {"error_weights": "source", **SOFT, "align": "activations"},
    "'width' narrows experts": {**FITTED, "width": 8, "budget": "damage"},
    "neurons 'gradient' are those": {**FITTED, "width": 8, "neurons": "gradient"},
    "'neurons' belongs": {"neurons": "energy", **GROUPED},
    "'sweeps' belongs": {"sweeps": 1, **GROUPED},
    "method 'smoe' merges nothing": {"method": "smoe", "merge": "grouped"},
    "method 'namex' reuses weights": {"method": "namex", **GROUPED},
    "method 'camex' weights experts by the input": {"method": "camex", **GROUPED},
    "method 'smear' has no base expert": {"method": "smear"},
    "method 'smear' merges all experts": {"method": "smear", **GROUPED},
    "'experts' belongs": {"experts": 4},
    "'budget' belongs": {"budget": "damage"},
    "'budget' is measured": {**GROUPED, "budget": "damage"},
    "'weighting' belongs": {"weighting": "uniform"},
    "'seed' belongs": {"seed": 1},
    "'base' is a choice of the base": {"base": "mean", **GROUPED},
    "'first_layer' belongs": {"first_layer": "sparse", "method": "smoe"},
    "'gamma' is a choice of the propagated": {"gamma": 0.5, "method": "smoe"},
    "'every' belongs": {"every": 2, "method": "namex"},
    "'disagreement' is a choice of the Nash": {"disagreement": "mean", "method": "ep-camex"},
    "'granularity' is a choice of the Nash": {"granularity": "expert", **GROUPED, "weighting": "uniform"},
    "'scale' is a choice of the Nash": {"scale": "lemma", "method": "smoe"},
    "'eta' belongs": {"eta": 0.5},
    "'segment' belongs": {"segment": 16, **GROUPED},
    "'top_k' belongs": {"top_k": 2},
    "'routing_span' belongs": {"routing_span": "previous"},
    "'renormalise' belongs": {"renormalise": True},
    "under routing_span 'token'": {"routing_span": "token", "segment": 8, **SOFT},
    "curvature 'calibrated' is no linear": {"routing_span": "token", **CURVED},
    "'beta' belongs": {"beta": "0.5"},
    "'momentum' is a choice of the propagated": {"momentum": "complex", **GROUPED},
    "'solver' is a choice of the Nash": {"solver": "ccp", "method": "ep-camex"},
    "'ccp_iterations' belongs": {"ccp_iterations": 5},
    "solver 'ccp' was published for the zero": {"solver": "ccp", "disagreement": "mean"},
    "merge 'grouped' replaces its members": {"scale": "lemma", **GROUPED},
    "'fit' belongs": {"fit": "router"},
    "'grouping' belongs": {"grouping": "weights"},
    "'curvature' belongs": {"curvature": "identity"},
    "'align' belongs": {"align": "weights"},
    "curvature 'diagonal' belongs": {"curvature": "diagonal", **SOFT},
    "'rank' belongs": {"rank": 2, **SOFT},
    "curvature 'kronecker' is trained": {"curvature": "kronecker", **GROUPED},
    "'temperature' belongs": {"temperature": "norms"},
    "curvature 'calibrated' weighs": {"eta": 1.5, **CURVED},
    "'down' belongs": {"down": "refit"},
    "'metric' belongs": {"metric": "calibrated"},
    "'power' belongs": {"power": "usage"},
    "'metric' is a choice of the Nash": {"metric": "calibrated", **FITTED, "method": "ep-camex"},
    "'power' is a choice of the Nash": {"power": "usage", **FITTED, "weighting": "usage"},
    "'operator' belongs": {"operator": "keep"},
    "'curvature' and 'align' say": {"align": "weights", **KEPT},
    "'method' says": {"method": "ep-camex", **KEPT},
    "operator 'keep' retains": {"weighting": "uniform", **KEPT},
    "operators 'random' and 'shared' weigh": {"weighting": "usage", **FITTED, "operator": "random"},
    "operators 'random' and 'shared' are": {"operator": "shared", **GROUPED},
    "grouping 'none' keeps": {"grouping": "none", **FITTED},
    "'target' belongs": {"target": "model", **GROUPED},
    "target 'model' makes": {"target": "model", "calibrate": "before", **FITTED},
    "'fit_steps' belongs": {"fit_steps": 50, **GROUPED},
    "'ridge' belongs": {"ridge": 0.1, **GROUPED},
    "'calibration_data' belongs": {"calibration_data": "text.txt", **GROUPED},
    "'calibration_tokens' belongs": {"calibration_tokens": 4096},
    "'calibrate' belongs": {"calibrate": "before", **GROUPED},
    "solver 'ccp' was published for equal": {"solver": "ccp", "power": "usage", **FITTED},
    "metric 'calibrated' bargains": {"metric": "calibrated", **GROUPED},
    "metric 'calibrated' plays": {"metric": "calibrated", "granularity": "expert", **FITTED},
    "power 'loss' is": {"power": "loss", **FITTED},
}
# A field with one value cannot differ from its default; the table has its line for the values to come.
UNBREAKABLE = [f"'{name}' " for name, spec in SPECS.items() if len(spec.choices or "12") == 1]


@pytest.mark.parametrize(("start", "values"), BROKEN.items())
def test_every_rule_can_be_broken(start: str, values: dict[str, Any]):
    with pytest.raises(RecipeError) as error:
        Recipe.from_dict(values)
    assert str(error.value).startswith(start)
    (rule,) = (rule for rule in RULES if rule.message.startswith(start))
    for name in rule.fields:
        known = values.get(name, SPECS[name].default)
        assert f"{name}={'' if known is None else known}" in str(error.value)  # what is not stated is implied


def test_every_rule_is_broken_above():
    for rule in RULES:
        covered = any(rule.message.startswith(start) for start in BROKEN)
        assert covered != rule.message.startswith(tuple(UNBREAKABLE)), rule.message


@pytest.mark.parametrize(
    ("values", "field"),
    [
        *(({"method": "camex", name: value}, name) for name, value in WALK_OR_BARGAIN.items()),
        *(({"method": "smear", **SOFT, name: value}, name) for name, value in WALK_OR_BARGAIN.items()),
        ({"method": "smear", **SOFT, "base": "first"}, "base"),
        ({"method": "smear", **SOFT, "eta": 0.5}, "eta"),
        ({"method": "smoe", "base": "first"}, "base"),
        ({"base": "first", **GROUPED}, "base"),
    ],
    ids=str,
)
def test_a_method_without_walk_bargain_or_base_refuses_their_fields(values: dict[str, Any], field: str):
    with pytest.raises(RecipeError, match=rf"^'{field}' (is a choice of|belongs to)"):
        Recipe.from_dict(values)


# Fields that say what is done with a text, and mean nothing under a `soft` that reads none.
OF_TEXT: dict[str, Any] = {
    **{"seed": 1, "ridge": 0.1, "rank": 4, "calibration_data": "text.txt", "calibration_tokens": 4096},
    **{"calibrate": "before"},
}


@pytest.mark.parametrize("name", OF_TEXT)
def test_soft_takes_the_fields_of_a_text_only_with_one(name: str):
    assert field_of(Recipe.from_dict({**CURVED, name: OF_TEXT[name]}), name) == OF_TEXT[name]
    for plain in (SOFT, {**SOFT, "curvature": "identity", "align": "none"}):
        with pytest.raises(RecipeError, match=rf"^'{name}' belongs to"):
            Recipe.from_dict({**plain, name: OF_TEXT[name]})
    aligned = {**SOFT, "align": "activations", name: OF_TEXT[name]}
    if name in ("ridge", "rank"):  # of a curvature, which this is not
        with pytest.raises(RecipeError, match=rf"^'{name}' belongs to"):
            Recipe.from_dict(aligned)
    else:
        assert field_of(Recipe.from_dict(aligned), name) == OF_TEXT[name]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"rank": 4, **GROUPED}, "'rank' belongs to merge 'soft' with curvature 'calibrated' or 'kronecker'"),
        ({"rank": 4, **FITTED}, "'rank' belongs to merge 'soft' with curvature 'calibrated' or 'kronecker'"),
        ({"rank": 4}, "'rank' belongs to merge 'soft' with curvature 'calibrated' or 'kronecker'"),
        ({"curvature": "kronecker"}, "'curvature' belongs to merge 'grouped' or 'soft'"),
        ({"curvature": "kronecker", "method": "smoe"}, "'curvature' belongs to merge 'grouped' or 'soft'"),
        ({"curvature": "kronecker", **FITTED}, "curvature 'kronecker' is trained where experts are merged in the"),
        ({**KRONECKER, "ridge": 0.1}, "'ridge' belongs to a curvature or a refitted down_proj"),
        ({**KRONECKER, "calibration_tokens": 4096}, "'calibration_tokens' belongs to a recipe that reads"),
        ({**KRONECKER, "method": "smoe"}, "method 'smoe' merges nothing"),
        ({"curvature": "calibrated"}, "'curvature' belongs to merge 'grouped' or 'soft'"),
        ({"curvature": "calibrated", "method": "smoe"}, "'curvature' belongs to merge 'grouped' or 'soft'"),
        ({"align": "activations"}, "'align' belongs to merge 'grouped' or 'soft'"),
        ({**CURVED, "fit": "router"}, "'fit' belongs to merge 'grouped'"),
        ({**CURVED, "metric": "calibrated"}, "'metric' belongs to merge 'grouped'"),
        ({**CURVED, "power": "usage"}, "'power' belongs to merge 'grouped'"),
        ({**CURVED, "weighting": "usage"}, "'weighting' belongs to merge 'grouped'"),
        ({**CURVED, "eta": 1.0001}, "curvature 'calibrated' weighs the base expert by 1 - eta sum s"),
        ({**CURVED, "method": "smear", "eta": 0.5}, "'eta' belongs to merge 'soft' with a base expert"),
    ],
    ids=str,
)
def test_what_a_calibrated_soft_does_not_go_with(values: dict[str, Any], says: str):
    with pytest.raises(RecipeError) as error:
        Recipe.from_dict(values)
    assert str(error.value).startswith(says)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (True, True, True)),
        ({"method": "ep-camex", **SOFT}, (True, True, True)),
        ({"method": "camex"}, (True, True, False)),
        ({"method": "camex", **SOFT}, (True, True, False)),
        ({"method": "smear", **SOFT}, (True, False, False)),
        (CURVED, (True, True, True)),
        ({"method": "smear", **CURVED}, (True, False, False)),
        ({"method": "smoe"}, (False, False, False)),
        (GROUPED, (False, False, False)),
        (COSINE, (True, True, True)),
        ({"method": "camex", **STABLE}, (True, True, False)),
        ({"method": "smear", **SOFT, **STABLE}, (True, False, False)),
        ({"method": "smoe", **COSINE}, (True, False, False)),
        ({"method": "smoe", **STABLE}, (True, False, False)),
        ({**GROUPED, **COSINE}, (True, False, False)),
        ({**FITTED, **STABLE}, (True, False, False)),
        ({"method": "smoe", "routing": "linear"}, (False, False, False)),
        (KRONECKER, (True, True, True)),
    ],
    ids=str,
)
def test_class_base_and_walk(values: dict[str, Any], expected: tuple[bool, ...]):
    recipe = Recipe.from_dict(values)
    assert (recipe.own_class, recipe.merge.has_base, recipe.merge.propagates) == expected


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"method": "camex", "base": "index:3"},
        {"method": "camex", **SOFT, "eta": 0.5},
        {"method": "smear", **SOFT, "top_k": 5, "segment": 16, "routing_span": "previous"},
        {"method": "namex", "base": "index:3", "gamma": 0.25, "scale": "lemma"},
        {"method": "ep-camex", "base": "shared"},
        {"method": "smoe"},
        {**GROUPED, "weighting": "nash", "disagreement": "mean", "granularity": "expert", "seed": 3},
        FITTED,
        {**FITTED, "metric": "calibrated", "power": "loss", "align": "none", "calibrate": "before"},
        {**GROUPED, "grouping": "outputs", "weighting": "usage", "calibration_tokens": 4096},
        {**FITTED, "fit": "layer", "fit_steps": 300, "weighting": "saliency", "target": "layer"},
        {**KEPT, "grouping": "none", "weighting": "saliency"},
        {**FITTED, "operator": "shared", "target": "model"},
        {**FITTED, "operator": "random", "calibrate": "before", "fit": "layer"},
        {"every": 3, "device": "cuda:1"},
        {"momentum": "quaternion", "solver": "ccp", "ccp_iterations": 5},
        {"momentum": "complex", "beta": "0.9,-0.5236"},
        {"merge": "soft", "eta": 0.5, "segment": 32, "top_k": 4, "routing_span": "prompt", "base": "shared"},
        CURVED,
        {**CURVED, "rank": 2, "align": "none", "ridge": 0.1, "seed": 3, "calibrate": "before", "eta": 0.5},
        {**SOFT, "align": "weights", "method": "smear", "calibration_data": "text.txt", "calibration_tokens": 512},
        COSINE,
        {**COSINE, **CURVED},
        {**COSINE, **FITTED, "temperature": "norms"},
        {**STABLE, "method": "smoe", "calibrate": "before", "seed": 4},
        {**KRONECKER, **STABLE, "rank": 3, "seed": 2**64 - 1},
    ],
)
def test_yaml_round_trip_without_the_device(tmp_path: Path, values: dict[str, Any]):
    recipe, file = Recipe.from_dict(values), tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert Recipe.from_yaml(file) == Recipe.from_dict({**values, "device": Recipe().device})
    assert "device" not in recipe.to_dict()
    assert "device" not in recipe.to_yaml()
    assert list(yaml.safe_load(recipe.to_yaml())) == [name for name in SPECS if name != "device"]


@pytest.mark.parametrize(
    ("values", "calibrated", "implied"),
    [
        ({}, False, (None, None, None, None, None)),
        (GROUPED, False, ("weights", "identity", "none", "merge", None)),
        (FITTED, True, ("damage", "calibrated", "activations", "refit", None)),
        ({**FITTED, "align": "none", "down": "merge"}, True, ("damage", "calibrated", "none", "merge", None)),
        ({**GROUPED, "weighting": "usage"}, True, ("weights", "identity", "none", "merge", None)),
        ({**GROUPED, "power": "usage"}, True, ("weights", "identity", "none", "merge", None)),
        ({**GROUPED, "align": "weights"}, True, ("weights", "identity", "weights", "merge", None)),
        ({**GROUPED, "align": "activations"}, True, ("weights", "identity", "activations", "merge", None)),
        ({**GROUPED, "grouping": "router"}, True, ("router", "identity", "none", "merge", None)),
        ({**GROUPED, "curvature": "diagonal"}, True, ("weights", "diagonal", "none", "merge", None)),
        (REFITTED, True, ("weights", "identity", "none", "refit", None)),
        ({**FITTED, "fit": "layer"}, True, ("damage", "calibrated", "activations", "refit", None)),
        ({**GROUPED, "weighting": "saliency"}, True, ("weights", "identity", "none", "merge", None)),
        (KEPT, True, ("weights", "identity", "none", "merge", None)),
        ({**KEPT, **FITTED}, True, ("damage", "identity", "none", "refit", None)),
        ({**KEPT, "grouping": "none", "weighting": "saliency"}, True, ("none", "identity", "none", "merge", None)),
        ({**FITTED, "operator": "random"}, True, ("damage", "identity", "none", "refit", None)),
        ({**FITTED, "operator": "shared"}, True, ("damage", "identity", "none", "refit", None)),
        (SOFT, False, (None, "identity", "none", None, None)),
        (CURVED, True, (None, "calibrated", "activations", None, 4)),
        ({**CURVED, "align": "none", "rank": 2}, True, (None, "calibrated", "none", None, 2)),
        ({**CURVED, "method": "smear"}, True, (None, "calibrated", "activations", None, 4)),
        ({**SOFT, "align": "weights"}, True, (None, "identity", "weights", None, None)),
        ({**SOFT, "align": "activations"}, True, (None, "identity", "activations", None, None)),
        ({**SOFT, "curvature": "identity", "align": "none"}, False, (None, "identity", "none", None, None)),
        (KRONECKER, False, (None, "kronecker", "none", None, 1)),
        ({**KRONECKER, "rank": 3}, False, (None, "kronecker", "none", None, 3)),
        ({**KRONECKER, "align": "activations"}, True, (None, "kronecker", "activations", None, 1)),
        ({**KRONECKER, "method": "smear"}, False, (None, "kronecker", "none", None, 1)),
        ({**KRONECKER, **STABLE}, True, (None, "kronecker", "none", None, 1)),
        (STABLE, True, (None, None, None, None, None)),
        ({**STABLE, "method": "smoe"}, True, (None, None, None, None, None)),
        ({**STABLE, **SOFT}, True, (None, "identity", "none", None, None)),
        ({**STABLE, **GROUPED}, True, ("weights", "identity", "none", "merge", None)),
        (COSINE, False, (None, None, None, None, None)),
        ({**COSINE, **GROUPED}, False, ("weights", "identity", "none", "merge", None)),
        ({**COSINE, "temperature": "entropy"}, True, (None, None, None, None, None)),
    ],
    ids=str,
)
def test_what_is_implied_and_which_recipes_read_text(values: dict[str, Any], calibrated: bool, implied: tuple):
    recipe = Recipe.from_dict(values)
    names = ("grouping", "curvature", "align", "down", "rank")
    assert tuple(field_of(recipe, name) for name in names) == implied
    assert recipe.needs_text == calibrated


@pytest.mark.parametrize(
    ("values", "fitted", "target"),
    [
        ({}, False, None),
        (SOFT, False, None),
        (CURVED, False, None),
        (STABLE, False, None),
        (GROUPED, False, None),
        ({**GROUPED, "weighting": "usage"}, False, None),
        (KEPT, False, None),
        ({**FITTED, "down": "merge"}, True, "layer"),
        (FITTED, True, "layer"),
        ({**FITTED, "fit": "layer"}, True, "layer"),
        (REFITTED, True, "layer"),
        ({**KEPT, "down": "refit"}, True, "layer"),
        ({**FITTED, "operator": "random"}, True, "layer"),
        ({**FITTED, "target": "model"}, True, "model"),
        ({**REFITTED, "target": "model"}, True, "model"),
        ({**FITTED, "calibrate": "before"}, True, "layer"),
        ({**REFITTED, "calibrate": "before"}, True, "layer"),
        ({**FITTED, "calibrate": "before", "target": "layer"}, True, "layer"),
    ],
    ids=str,
)
def test_what_a_fit_aims_at_where_nothing_is_said(values: dict[str, Any], fitted: bool, target: str | None):
    recipe = Recipe.from_dict(values)
    assert (getattr(recipe.merge, "fitted", False), field_of(recipe, "target")) == (fitted, target)
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("values", "weights_by"),
    [
        (GROUPED, "nash"),
        ({**GROUPED, "method": "ep-camex"}, "uniform"),
        ({**GROUPED, "weighting": "saliency"}, "saliency"),
        ({**GROUPED, "method": "ep-camex", "weighting": "nash"}, "nash"),
        (KEPT, "usage"),
        ({**KEPT, "weighting": "usage"}, "usage"),
        ({**KEPT, "weighting": "saliency"}, "saliency"),
        ({**FITTED, "operator": "random"}, None),
        ({**FITTED, "operator": "shared"}, None),
        ({"method": "smoe"}, None),
    ],
    ids=str,
)
def test_the_weighting_in_force(values: dict[str, Any], weights_by: str | None):
    assert Recipe.from_dict(values).merge.weights_by == weights_by


# Choices of `grouped` on text that lean on each other; None: not stated.
CALIBRATED = {
    "operator": ("merge", "keep", "random", "shared"),
    "weighting": (None, "nash", "uniform", "usage", "saliency"),
    "grouping": (None, "weights", "none"),
    "fit": ("none", "router", "layer"),
    "down": (None, "merge", "refit"),
    "align": (None, "none", "activations"),
    "target": (None, "layer", "model"),
    "calibrate": ("after", "before"),
}


def means_something(row: dict[str, Any]) -> bool:
    """By the words of the table, once more."""
    operator, weighting, fits = row["operator"], row["weighting"], row["fit"] != "none"
    refits = row["down"] == "refit" or (row["down"] is None and fits)
    if operator == "keep" and weighting not in (None, "usage", "saliency"):
        return False
    if operator in ("random", "shared") and (weighting is not None or not fits):
        return False
    if operator != "merge" and row["align"] == "activations":
        return False
    if operator != "keep" and row["grouping"] == "none":
        return False
    if row["target"] is not None and not (fits or refits):
        return False
    reads = fits or refits or weighting in ("usage", "saliency") or operator == "keep" or row["align"] == "activations"
    return row["calibrate"] == "after" or (reads and row["target"] != "model")


def test_every_combination_on_text_is_refused_or_means_what_it_says():
    """And what is made of it is the same however often it is stored and read."""
    assert all(set(choices) - {None} <= set(SPECS[name].choices) for name, choices in CALIBRATED.items())
    found = {True: 0, False: 0}
    for values in product(*CALIBRATED.values()):
        row = dict(zip(CALIBRATED, values, strict=True))
        stated = {name: value for name, value in row.items() if value is not None}
        try:
            recipe = Recipe.from_dict({**GROUPED, **stated})
        except RecipeError:
            recipe = None
        assert (recipe is not None) == means_something(row), stated
        found[recipe is not None] += 1
        if recipe is not None:
            assert all(field_of(recipe, name) == value for name, value in stated.items())
            assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert min(found.values()) > 500


@pytest.mark.parametrize(
    ("values", "temperature"),
    [
        ({}, None),
        (STABLE, None),
        (COSINE, "norms"),
        ({**COSINE, "method": "smoe"}, "norms"),
        ({**COSINE, **SOFT}, "norms"),
        ({**COSINE, **KRONECKER}, "norms"),
        ({**COSINE, **GROUPED}, "norms"),
        ({**COSINE, **CURVED}, "entropy"),
        ({**COSINE, **SOFT, "align": "weights"}, "entropy"),
        ({**COSINE, **FITTED}, "entropy"),
        ({**COSINE, **GROUPED, "grouping": "outputs"}, "entropy"),
        ({**COSINE, **CURVED, "temperature": "norms"}, "norms"),
        ({**COSINE, **FITTED, "temperature": "norms"}, "norms"),
        ({**COSINE, "temperature": "entropy"}, "entropy"),
    ],
    ids=str,
)
def test_how_sharp_a_cosine_router_is_where_nothing_is_said(values: dict[str, Any], temperature: str | None):
    """As text says, where it is read anyway; what is implied makes no recipe read text that would not."""
    recipe = Recipe.from_dict(values)
    assert field_of(recipe, "temperature") == temperature
    linear = {name: value for name, value in values.items() if name not in COSINE}
    if "temperature" not in values and values.get("routing") != "stable":
        assert recipe.needs_text == Recipe.from_dict(linear).needs_text
    assert Recipe.from_dict(recipe.to_dict()) == recipe


OF_ANY_TEXT: dict[str, Any] = {
    **{"seed": 1, "calibration_data": "text.txt", "calibration_tokens": 4096, "calibrate": "before"},
}


@pytest.mark.parametrize("name", OF_ANY_TEXT)
@pytest.mark.parametrize("method", ["namex-full", "camex", "smoe"])
def test_routing_takes_the_fields_of_a_text_only_with_one(name: str, method: str):
    field = {name: OF_ANY_TEXT[name], "method": method}
    for reads in (STABLE, {**COSINE, "temperature": "entropy"}):
        assert field_of(Recipe.from_dict({**reads, **field}), name) == OF_ANY_TEXT[name]
    for reads_none in ({}, COSINE, {**COSINE, "temperature": "norms"}):
        with pytest.raises(RecipeError, match=rf"^'{name}' belongs to"):
            Recipe.from_dict({**reads_none, **field})


@pytest.mark.parametrize("temperature", ["norms", "entropy"])
@pytest.mark.parametrize("around", [{}, SOFT, GROUPED, FITTED, CURVED, {"method": "smoe"}], ids=str)
def test_a_temperature_is_one_of_a_cosine_router(temperature: str, around: dict[str, Any]):
    assert Recipe.from_dict({**around, **COSINE, "temperature": temperature}).routing.temperature == temperature
    for routing in ("linear", "stable"):
        with pytest.raises(RecipeError, match=r"^'temperature' belongs to routing 'cosine'; found routing=" + routing):
            Recipe.from_dict({**around, "routing": routing, "temperature": temperature})


def test_equal_recipes_are_stored_alike():
    assert Recipe(gamma=1).to_yaml() == Recipe(gamma=1.0).to_yaml() == Recipe().to_yaml()


def test_keywords_go_before_the_file(tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    file.write_text("method: ep-camex\ngamma: 0.5\n")
    assert Recipe.from_yaml(file, gamma=0.75) == Recipe(method="ep-camex", gamma=0.75)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- merge\n- grouped\n", "list"),
        ("grouped", "str"),
        ("merge: [", "cannot be read"),
        ("merge: \tgrouped: x", "cannot be read"),
        ("seed: 1\nseed: 1", "'seed' is there twice"),
        ("!!python/object:os.system {}", "cannot be read"),
        ("? [a]\n: b", "cannot be read"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, says: str):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as error:
        read_yaml(file)
    assert says in str(error.value)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"absent\.yaml cannot be read"):
        read_yaml(tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_yaml(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(RecipeError, match=r"bytes\.yaml cannot be read"):
        read_yaml(tmp_path / "bytes.yaml")


def test_an_empty_file_is_the_default_recipe(tmp_path: Path):
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert Recipe.from_yaml(tmp_path / "empty.yaml") == Recipe()


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.binary(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.from_regex(r"\Aindex:[0-9]{1,3}\Z"),
)
SENSIBLE = st.fixed_dictionaries(
    {},
    optional={
        name: st.sampled_from(spec.choices)
        if spec.choices
        else {
            "experts": st.integers(0, 70),
            "width": st.integers(0, 70),
            "keep": st.floats(0, 1),
            "sweeps": st.integers(0, 9),
            "base": st.sampled_from(("shared", "first", "mean", "index:7")),
            "gamma": st.floats(0, 4),
            "every": st.integers(0, 30),
            "seed": st.integers(0, 9),
            "eta": st.floats(0, 2),
            "renormalise": st.booleans(),
            "segment": st.integers(0, 99),
            "top_k": st.integers(0, 9),
            "rank": st.integers(0, 9),
            "beta": st.sampled_from(("0.9", "1.1", "0.5,0.5", "0.1,0.2,0.3,0.4")),
            "ccp_iterations": st.integers(0, 9),
            "fit_steps": st.integers(0, 9),
            "ridge": st.floats(0, 1),
            "calibration_data": st.sampled_from(("packaged", "text.txt")),
            "calibration_tokens": st.integers(0, 9999),
            "device": st.just("cpu"),
        }[name]
        for name, spec in SPECS.items()
    },
)


@given(st.one_of(SENSIBLE, st.dictionaries(st.one_of(st.sampled_from(sorted(SPECS)), st.text(max_size=8)), ANYTHING)))
def test_any_values_build_or_are_refused_as_a_recipe(values: dict[str, Any]):
    try:
        recipe = Recipe.from_dict(values)
    except NamexError as error:
        assert type(error) is RecipeError  # noqa: PT017  (any other exception fails by itself)
        return
    assert not any(rule.broken(part) for part in (recipe, *recipe.parts) for rule in part.rules)
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == Recipe.from_dict({**values, "device": Recipe().device})
    assert recipe.merge.weights_by in ("nash", "uniform", "usage", "saliency", None)


def test_the_docs_print_the_fields_and_the_validity_table():
    page = (Path(__file__).parents[2] / "docs" / "recipe.md").read_text("utf-8")
    for name, spec in SPECS.items():
        assert f"| `{name}` |" in page
        for choice in spec.choices:
            assert f"`{choice}`" in page
    for rule in RULES:
        assert f"| {rule.message} |" in page


@pytest.mark.parametrize(
    "text",
    [
        "seed: 12:30:45",
        "seed: 010",
        "seed: 0o10",
        "seed: 0x10",
        "seed: 0b10",
        "seed: 1_000",
        "seed: 2001-01-01",
        "seed: yes",
        "seed: true",
        "every: 1.0",
        "gamma: 1:30",
        "gamma: 1_0.5",
        "gamma: .inf",
        "gamma: .nan",
        "gamma: on",
    ],
)
def test_scalars_that_are_no_number(tmp_path: Path, text: str):
    """YAML 1.1 reads 45045, 8, 1000, true ... here."""
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    name = text.split(":")[0]
    with pytest.raises(RecipeError, match=f"recipe field '{name}' is .*accepted: a finite") as error:
        Recipe.from_yaml(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gamma: 5e-1", {"gamma": 0.5}),
        ("gamma: .5", {"gamma": 0.5}),
        ("gamma: 1", {"gamma": 1}),
        ("seed: +7", {"seed": 7}),
        ("seed: -7", {"seed": -7}),
        ("seed: 0", {"seed": 0}),
        ("experts: null", {"experts": None}),
        ("experts:", {"experts": None}),
        ("calibration_data: no", {"calibration_data": "no"}),
        ("calibration_data: 2024-05-01", {"calibration_data": "2024-05-01"}),
        ("calibration_data: 'true'", {"calibration_data": "true"}),
        ("beta: 0.9,0.2618", {"beta": "0.9,0.2618"}),
        ("base: index:3", {"base": "index:3"}),
        ("", {}),
    ],
)
def test_scalars_are_what_they_look_like(tmp_path: Path, text: str, expected: dict):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    found = read_yaml(file)
    assert found == expected
    assert [type(value) for value in found.values()] == [type(value) for value in expected.values()]


TRAINED = {"merge": "soft", "curvature": "kronecker"}
FITTED = {"merge": "grouped", "experts": 4, "fit": "router"}


@pytest.mark.parametrize(
    ("name", "most", "others"),
    [
        ("every", 10_000, {}),
        ("experts", 1 << 20, {"merge": "grouped"}),
        ("ccp_iterations", 10_000, {"solver": "ccp"}),
        ("segment", 1 << 31, {"merge": "soft"}),
        ("top_k", 1 << 20, {"merge": "soft"}),
        ("fit_steps", 10_000_000, FITTED),
        ("calibration_tokens", 1 << 40, FITTED),
        ("rank", 1 << 20, TRAINED),
    ],
)
def test_counts_have_bounds(name: str, most: int, others: dict):
    assert field_of(Recipe(**{**others, name: most}), name) == most
    for beyond in (most + 1, 2**78, 0, -(2**78)):
        with pytest.raises(RecipeError, match=f"'{name}' is {beyond}; accepted: a whole number from 1 to {most}"):
            Recipe(**{**others, name: beyond})


@pytest.mark.parametrize(("name", "others"), [("gamma", {}), ("eta", {"merge": "soft"}), ("ridge", {**FITTED})])
def test_factors_have_bounds(name: str, others: dict):
    assert field_of(Recipe(**{**others, name: 1e6}), name) == 1e6
    for beyond in (1.1e6, 1e300, 2**78, 0, -1):
        with pytest.raises(RecipeError, match=f"'{name}' is .*; accepted: a number above 0, up to 1e"):
            Recipe(**{**others, name: beyond})


def test_a_stored_recipe_has_a_version_and_is_read_as_the_run_meant_it():
    recipe = Recipe(merge="grouped", experts=4)
    assert recipe.to_stored() == {"recipe_version": VERSION, **recipe.to_dict()}
    assert Recipe.from_dict(recipe.to_stored()) == Recipe.from_stored(recipe.to_stored()) == recipe
    assert yaml.safe_load(recipe.to_yaml(stored=True)) == recipe.to_stored()
    accepted = f"^recipe field 'recipe_version' is .*; accepted: whole numbers to {VERSION}$"
    for version in (0, VERSION + 1, "2", None):
        with pytest.raises(RecipeError, match=accepted):
            Recipe.from_dict({"recipe_version": version})


@pytest.mark.parametrize("version", [1, 2])
def test_stored_recipes_without_error_weights_let_all_sequences_count_alike(version: int):
    """A user's file has today's default; a merge that reads no text has no errors."""
    stored = {"recipe_version": version, **GROUPED, "fit": "layer"}
    assert field_of(Recipe.from_dict(stored), "error_weights") == "sequence"
    assert field_of(Recipe.from_dict({**GROUPED, "fit": "layer"}), "error_weights") == "none"
    for fields in (GROUPED, SOFT, {}):
        assert field_of(Recipe.from_dict({"recipe_version": version, **fields}), "error_weights") == "none"


@pytest.mark.parametrize(
    ("fields", "sweeps"),
    [
        ({}, 1),
        ({"fit": "layer"}, 0),
        ({"neurons": "energy"}, 0),
        ({"sweeps": 2}, 2),
        ({"fit": "layer", "sweeps": 1}, 1),
    ],
)
def test_a_sweep_is_what_keeps_more_without_a_fit(fields: dict[str, Any], sweeps: int):
    """What was stored before there were sweeps made none. Moments alone do not do for one."""
    recipe = Recipe(**NARROW, **fields)
    assert field_of(recipe, "sweeps") == field_of(Recipe.from_dict(recipe.to_stored()), "sweeps") == sweeps
    assert recipe.reads_moments_alone == (sweeps == 0 and "fit" not in fields)
    earlier = {name: value for name, value in recipe.to_stored().items() if name != "sweeps"}
    for version in (2, 3):
        assert field_of(Recipe.from_dict({**earlier, "recipe_version": version}), "sweeps") == 0


@pytest.mark.parametrize("fields", [GROUPED, {"method": "smoe"}, {}], ids=str)
def test_what_0_1_0_stored_opens(fields: dict[str, Any]):
    """Its defaults of other merges' fields are no choices; a user's file is refused for them."""
    of_that_release = {"merge": "residual", "base": "first", "grouping": "weights", **fields}
    base = {"base": "first"} if not fields else {}
    assert Recipe.from_stored(of_that_release) == Recipe.from_dict({**fields, **base})
    with pytest.raises(RecipeError, match=r"'(base|grouping)' (is a choice of|belongs to)"):
        Recipe.from_dict(of_that_release)


def test_a_stored_weighting_need_not_be_installed():
    stored = {**Recipe(**GROUPED, weighting="usage").to_stored(), "weighting": "of-others"}
    assert Recipe.from_stored(stored).to_stored() == stored
    assert Recipe.from_stored({**stored, "recipe_version": 2}).to_stored() == {**stored, "error_weights": "sequence"}
    with pytest.raises(RecipeError, match="'weighting' is 'of-others'; accepted: nash, uniform, usage, saliency"):
        Recipe.from_dict({**GROUPED, "weighting": "of-others"})
