"""The recipe: every choice that makes a patched model, validated once, in parts.

It is flat where it is written: YAML files, flags of the command line, ``config.json["namex"]`` and keyword arguments.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, get_args

import yaml

from ..errors import RecipeError
from ..files import LARGEST_RECIPE, read_text
from ..plain_yaml import parse_yaml
from ..printable import did_you_mean
from .choices import MergeKind
from .merges import SEGMENT, Merge, Nothing, Residual, Soft
from .part import Leaf, Part, Range, Rule, Spec, all_leaves, build, leaf, leaves_of, parts_of
from .parts import CCP_ITERATIONS, STORED, Calibration, Routing
from .smaller import Grouped, Narrow

VERSION = 4
"""Of recipes that runs store; those of release 0.1.0 have none, those before `error_weights` have 2."""
MERGES: dict[str, type[Residual] | type[Soft] | type[Grouped] | type[Narrow]] = {
    kind.kind: kind for kind in (Residual, Soft, Grouped, Narrow)
}


@dataclass(frozen=True, init=False)
class Recipe(Part):
    """What to do to a checkpoint. All fields have defaults; `Recipe()` is NAMEx-Full in its residual form.

    ``Recipe(merge="grouped", experts=12)`` takes fields by their flat names, as a file does; parts, too:
    ``Recipe(merge=Grouped(experts=12))``, and beside them flat fields, which go before what the parts say.

    Raises:
        RecipeError: naming the field, the value found and what is accepted.
    """

    merge: Residual | Soft | Grouped | Narrow | Nothing
    routing: Routing
    calibration: Calibration
    seed: int = leaf(
        0,
        "seed of the choice of calibration text; grouped: of batches, directions and experts at random",
        within=Range(lambda seed: 0 <= seed < 1 << 64, "a whole number from 0 below 2**64"),
        belongs="belongs to merge 'grouped', to curvature 'kronecker' and to recipes that read calibration text",
        shown=("merge", "curvature"),
    )
    device: str = leaf(
        "auto", "torch device of the arithmetic, auto: an accelerator if there is one; never stored in outputs"
    )

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            lambda recipe: (
                isinstance(recipe.merge, Grouped)
                and recipe.merge.budget != "equal"
                and not (recipe.needs_text and recipe.routing.kind == "linear")
            ),
            "'budget' is measured on calibration text and keeps the linear router: it needs a fit, or what else reads "
            "text, and routing 'linear'",
            ("fit", "routing", "budget"),
        ),
        Rule(
            lambda recipe: (
                isinstance(recipe.merge, Grouped)
                and recipe.merge.target == "model"
                and recipe.calibration.when == "before"
            ),
            "target 'model' makes up for the errors of the layers below, which calibrate 'before' does not see",
            ("target", "calibrate"),
        ),
    )

    def __init__(self, **values: Any) -> None:
        self._build(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Build from plain values, such as a file or a configuration holds.

        Values without ``recipe_version`` are a user's: fields that are not stated have today's defaults. With it they
        are what a run stored.
        """
        if "recipe_version" in values:
            return cls.from_stored(values)
        return cls._from(without_old_span(values))

    @classmethod
    def from_stored(cls, values: Mapping[str, Any]) -> "Recipe":
        """Build from what a run stored; release 0.1.0 stored no version. A weighting need not be installed."""
        values = dict(values)
        version = values.pop("recipe_version", 1)
        if version not in range(1, VERSION + 1):
            raise RecipeError(f"recipe field 'recipe_version' is {version!r}; accepted: whole numbers to {VERSION}")
        if version < 4 and values.get("merge") == "narrow":  # as before there were sweeps
            values.setdefault("sweeps", 0)
        recipe = cls._from(values if version > 1 else from_version_1(values), registered=False)
        weighed = version < 3 and isinstance(recipe.merge, Grouped) and recipe.needs_text
        if weighed:  # as every fit did before there was a choice
            return cls._from({**recipe.to_dict(), "error_weights": "sequence"}, registered=False)
        return recipe

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> "Recipe":
        """Read a YAML mapping of fields; keyword arguments go before what the file says."""
        return cls.from_dict({**read_yaml(path), **overrides})

    def to_dict(self) -> dict[str, Any]:
        """All fields but the device as plain values by flat names, always in the same order."""
        values = {**{name: one.default for name, one in FIELDS.items()}, **self.flat()}
        values["ccp_iterations"] = values["ccp_iterations"] or CCP_ITERATIONS
        if not isinstance(self.merge, Narrow):
            values |= {name: values[name] or value for name, value in STORED.items()}
        return {name: values[name] for name in FIELDS if name != "device"}

    def to_stored(self) -> dict[str, Any]:
        """`to_dict` as a run stores it, with its version."""
        return {"recipe_version": VERSION, **self.to_dict()}

    def to_yaml(self, stored: bool = False) -> str:
        """`to_dict` or, stored, `to_stored` as YAML."""
        return yaml.safe_dump(self.to_stored() if stored else self.to_dict(), sort_keys=False)

    @property
    def steps(self) -> list[str]:
        """What is done to every layer, in this order, by the names of `patching.steps`."""
        steps, linear = list(self.merge.steps(self.needs_text)), self.routing.kind == "linear"
        if not linear:
            steps.append("reroute")
        if not self.needs_text and "propagate" in steps:  # files hold a layer's base expert after its other parts
            steps.append(steps.pop(steps.index("propagate")))
        if self.needs_text and not (linear and self.merge.rewrites):
            steps.append("answer")
        return steps

    @property
    def reads_scores_alone(self) -> bool:
        """Whether the scores of another run on the same source and text do in the place of the text."""
        before = self.needs_text and self.calibration.when == "before" and self.routing.kind == "linear"
        return before and isinstance(self.merge, Grouped) and self.merge.weighs_alone

    @property
    def reads_original(self) -> bool:
        """Whether each layer sees the text as the original's does, however many experts or neurons stay."""
        return self.needs_text and self.calibration.when == "before" and self.merge.rewrites

    @property
    def reads_moments_alone(self) -> bool:
        """Whether the moments of neurons that another run measured do in the place of the text."""
        before = self.calibration.when == "before" and self.routing.kind == "linear"
        narrows = isinstance(self.merge, Narrow) and self.merge.fit.kind == "none" and not self.merge.sweeps
        return before and narrows and not self.needs_gradients

    @property
    def needs_gradients(self) -> bool:
        """Whether the whole model is in memory once, for the loss's gradients."""
        return isinstance(self.merge, Narrow) and self.merge.neurons == "gradient"

    def with_text(self, name: str) -> "Recipe":
        """The same with the name of the calibration text that was read."""
        return replace(self, calibration=replace(self.calibration, data=name))

    @property
    def own_class(self) -> bool:
        """Whether the result is of its family's patched class; otherwise it is a stock model."""
        if isinstance(self.merge, Grouped):
            return self.routing.kind != "linear" or self.merge.budget != "equal"
        return self.routing.kind != "linear" or not isinstance(self.merge, Narrow | Nothing)

    def imply(self) -> None:
        if self.routing.kind == "cosine" and self.routing.temperature is None:
            self._set("routing", replace(self.routing, temperature="entropy" if self.needs_text else "norms"))
        if not self.needs_text:
            return
        when, tokens = STORED["calibrate"], STORED["calibration_tokens"]
        if isinstance(self.merge, Narrow):
            when, tokens = "before" if self.merge.fit.kind == "none" else when, None
        self._set("calibration", self.calibration.filled(when=when, tokens=tokens))

    def unused(self) -> Iterator[str]:
        if not self.needs_text:
            yield from (one.name for one in leaves_of(Calibration))
            trained = isinstance(self.merge, Soft) and self.merge.curvature.kind == "kronecker"
            if not trained and not self.merge.rewrites:
                yield "seed"
        elif not self.merge.rewrites:
            yield "error_weights"

    def _found(self) -> dict[str, Any]:
        return self.to_dict()

    @classmethod
    def _from(cls, values: Mapping[str, Any], registered: bool = True) -> "Recipe":
        recipe = cls.__new__(cls)
        recipe._build(values, registered)
        return recipe

    def _build(self, values: Mapping[str, Any], registered: bool = True) -> None:
        stated = stated_fields(values, registered)
        implied = "residual" if stated.get("keep") is None else "narrow"
        kind: type[Merge] = MERGES[stated.pop("merge", None) or implied]
        if kind is Residual and stated.get("method") == "smoe":
            kind = Nothing
        for name, value in STORED.items() if kind is not Narrow else ():
            if stated.get(name) == value:
                del stated[name]
        self._set("merge", build(kind, stated))
        for attribute, part in parts_of(Recipe).items():
            self._set(attribute, build(part, stated))
        for one in leaves_of(Recipe):
            self._set(one.attribute, stated.pop(one.name, one.default))
        for name, value in stated.items():
            if value not in (None, FIELDS[name].default):
                raise refusal_of_absent(FIELDS[name]).error({**self.to_dict(), name: value})
        self.__post_init__()


def stated_fields(values: Mapping[str, Any], registered: bool) -> dict[str, Any]:
    """Values by flat names, those of parts first.

    Raises:
        RecipeError: an unknown field, or a value that a field does not accept.
    """
    flat: dict[str, Any] = {}
    for value in values.values():
        if isinstance(value, Part):
            flat |= value.flat()
    flat |= {name: value for name, value in values.items() if not isinstance(value, Part)}
    unknown = sorted(str(name) for name in flat if name not in FIELDS)
    if unknown:
        hint = did_you_mean(unknown[0], FIELDS)
        raise RecipeError(f"unknown recipe field '{unknown[0]}'; accepted: {', '.join(FIELDS)}{hint}")
    if flat.get("solver") != "ccp" and flat.get("ccp_iterations") == CCP_ITERATIONS:  # stored whatever the solver
        del flat["ccp_iterations"]
    return {name: FIELDS[name].clean(value, registered) for name, value in flat.items()}


def without_old_span(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Values without the span that unreleased versions before 0.2.0 stored under every merge."""
    spans = values.get("routing_span") == "all" and values.get("segment") in (None, SEGMENT)
    if values.get("merge") == "soft" or not spans:
        return values
    return {name: value for name, value in values.items() if name not in ("segment", "routing_span")}


def from_version_1(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """What release 0.1.0 stored, without its defaults of fields that belong to other merges."""
    strays = set()
    if values.get("merge") == "grouped" or values.get("method") == "smoe":
        strays |= {"base"} if values.get("base") == "first" else set()
    if values.get("merge") != "grouped":
        strays |= {"grouping"} if values.get("grouping") == "weights" else set()
    return without_old_span({name: value for name, value in values.items() if name not in strays})


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a recipe file.

    Raises:
        RecipeError: no such file, not YAML, or not a mapping of fields.
    """
    try:
        values = parse_yaml(read_text(Path(path), RecipeError, LARGEST_RECIPE))
    except (RecipeError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"recipe file {path} cannot be read: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RecipeError(f"recipe file {path} holds {type(values).__name__}; accepted: a mapping of fields to values")
    return values


ORDER = (
    *("merge", "method", "weighting", "operator", "experts", "width", "keep", "neurons", "sweeps", "budget"),
    *("fit", "fit_steps", "grouping", "curvature", "rank", "ridge", "align", "down", "target", "metric", "power"),
    *("calibration_data", "calibration_tokens", "calibrate", "error_weights", "routing", "temperature"),
    *("disagreement", "base", "first_layer"),
    *("granularity", "scale", "gamma", "momentum", "beta", "solver", "ccp_iterations", "eta", "renormalise"),
    *("segment", "top_k", "routing_span", "every", "seed", "device"),
)
"""Of the fields where they are written: that of release 0.1.0, with newer ones between. The newest follow it."""
_MERGE = Spec(
    "where the merged expert acts. residual: top-k experts stay and the base expert takes the mass that top-k "
    "leaves over; soft: every token goes through its own merged expert (paper eq. 9); grouped: experts are "
    "clustered and each group becomes one, a smaller stock checkpoint; narrow: every expert and the router stay, of "
    "each expert the neurons go that matter least, a smaller stock checkpoint too",
    *(None, None, None, "", ()),
)
_LEAVES = {one.name: one for kind in (Nothing, Narrow, Grouped, Soft, Residual, Recipe) for one in all_leaves(kind)}
_LEAVES["merge"] = Leaf("merge", "merge", Recipe, "residual", str, get_args(MergeKind), _MERGE)
_LEAVES["method"] = leaves_of(Residual)[0]
FIELDS: dict[str, Leaf] = {name: _LEAVES[name] for name in (*ORDER, *_LEAVES)}
"""All fields by flat names."""


def refusal_of_absent(one: Leaf) -> Rule:
    """What is said of a field that is stated where no part has it."""
    if one.spec.belongs or "belongs" in vars(one.owner):
        return one.refusal_of_unused()
    owners = sorted(name for name, kind in MERGES.items() if one in all_leaves(kind))
    among = "" if "residual" not in owners else " and a method that merges"
    named = " or ".join(f"'{name}'" for name in owners)
    shown = ("merge", "method") if among else ("merge",)
    return one.refusal_of_unused(f"belongs to merge {named}{among}", shown)


def refusals() -> tuple[Rule, ...]:
    """Everything that is refused beside values that no recipe accepts, as the documentation prints it."""
    kinds = [*MERGES.values(), Recipe]
    every = [part for kind in kinds for part in (kind, *parts_of(kind).values())]
    everywhere = {"merge", *(one.name for kind in (Merge, Recipe) for one in all_leaves(kind))}
    rules = [refusal_of_absent(one) for one in FIELDS.values() if one.name not in everywhere]
    known = [one for part in every for one in leaves_of(part) if one.spec.belongs or one.owner.belongs]
    rules += [one.refusal_of_unused() for one in known]
    rules += [rule for part in every for rule in part.rules]
    return tuple({rule.message: rule for rule in rules}.values())
