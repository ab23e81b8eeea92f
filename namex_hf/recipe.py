"""The recipe: every choice that makes a patched model, validated once.

The same fields serve YAML files, the command line and ``config.json["namex"]``. A field or value that is not known, and
choices that mean nothing together, are refused before any tensor is read.
"""

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from .errors import RecipeError
from .files import LARGEST_RECIPE, read_text
from .momentum import parse_momentum
from .plain_yaml import parse_yaml
from .printable import did_you_mean

UNSTORED = ("device",)
BASES = re.compile(r"shared|first|mean|index:[0-9]{1,9}")
LARGEST = 1e6
"""Of the fields that are factors."""
MOST = {
    "every": 10_000,
    "experts": 1 << 20,
    "ccp_iterations": 10_000,
    "segment": 1 << 31,
    "top_k": 1 << 20,
    "fit_steps": 10_000_000,
    "calibration_tokens": 1 << 40,
    "rank": 1 << 20,
}
"""Whole numbers that are counts, with more than any model, text or patience has."""
IMPLIED = {"namex-full": "nash", "namex": "nash", "ep-camex": "uniform"}
"""Weightings by method; a method that is not here settles no weights."""

CCP_ITERATIONS = 2
CCP_BUDGET = 20
"""Convex problems a game: in every layer; and the paper's budget of a pass, which NAMEx spends in one layer."""

IMPLIED_BY_FIT = {
    "grouping": ("weights", "damage"),
    "curvature": ("identity", "calibrated"),
    "align": ("none", "activations"),
    "down": ("merge", "refit"),
}
"""What fields of ``grouped`` are where they are not stated: without a fit, and with one."""

IMPLIED_BY_CURVATURE: dict[str, dict[str, Any]] = {
    "identity": {"align": "none"},
    "calibrated": {"align": "activations", "rank": 4},
    "kronecker": {"align": "none", "rank": 1},
}
"""What fields of ``soft`` are where they are not stated."""


def _choice(default: str | None, choices: tuple[str, ...], text: str) -> Any:
    return field(default=default, metadata={"choices": choices, "help": text})


def _value(default: Any, kind: type, text: str) -> Any:
    return field(default=default, metadata={"kind": kind, "help": text})


@dataclass(frozen=True)
class Recipe:
    """What to do to a checkpoint. All fields have defaults; `Recipe()` is NAMEx-Full in its residual form.

    Raises:
        RecipeError: naming the field, the value found and what is accepted.
    """

    merge: str = _choice(
        "residual",
        ("residual", "soft", "grouped"),
        "where the merged expert acts. residual: top-k experts stay and the base expert takes the mass that top-k "
        "leaves over; soft: every token goes through its own merged expert (paper eq. 9); grouped: experts are "
        "clustered and each group becomes one, a smaller stock checkpoint",
    )
    method: str = _choice(
        "namex-full",
        ("namex-full", "namex", "ep-camex", "camex", "smear", "smoe"),
        "how weights and base come about. namex-full: a Nash bargain in every layer; namex: one at the first layer "
        "that agrees, reused; ep-camex: plain mean; camex: every layer has a base of its own; smear: no base, all "
        "experts merged by the router; smoe: no merging, the sparse original",
    )
    weighting: str | None = _choice(
        None,
        ("nash", "uniform", "usage", "saliency"),
        "grouped: weights inside a group (default: what the method implies; where experts are kept, usage). usage: "
        "tokens received; saliency: mean over them of gate value times norm of the answer",
    )
    operator: str = _choice(
        "merge",
        ("merge", "keep", "random", "shared"),
        "grouped: what a group becomes. merge: one expert of all; keep: its weightiest expert, the others are pruned; "
        "random, shared: controls of a fit, that begins at random experts or at slices of the shared one",
    )
    experts: int | None = _value(None, int, "grouped: how many experts stay in every layer")
    budget: str = _choice(
        "equal",
        ("equal", "damage"),
        "grouped, with calibration text: equal: every layer keeps 'experts'; damage: all together keep as many, more "
        "where fewer would cost the model more, as measured on the text; the result is of a class of its own",
    )
    fit: str = _choice(
        "none",
        ("none", "router", "layer"),
        "grouped: fit to the original on calibration text. router: the router's rows; layer: after that rows, experts "
        "and the shared expert. A fit makes calibrated merging the default of curvature, align, grouping and down",
    )
    fit_steps: int = _value(1000, int, "fit: steps of an optimiser a layer; the best on held-out tokens are kept")
    grouping: str | None = _choice(
        None,
        ("damage", "outputs", "router", "weights", "none"),
        "grouped: how groups are found. damage: least added error of the output on calibration text (Ward); outputs, "
        "router, weights: average linkage of mean outputs, gate values, weights; none: no groups, the weightiest "
        "experts of the layer are kept (default: damage with a fit, else weights)",
    )
    curvature: str | None = _choice(
        None,
        ("identity", "calibrated", "diagonal", "kronecker"),
        "grouped, soft: what a change of a matrix counts for. identity: its size; calibrated: the error on what the "
        "expert sees in calibration text; diagonal (grouped): the same, input by input; kronecker (soft): trainable, "
        "the identity until it is trained (default: calibrated with a fit, else identity)",
    )
    rank: int | None = _value(
        None,
        int,
        "soft; curvature calibrated: leading directions of the inputs kept of every expert (default: 4); kronecker: "
        "products summed up (default: 1)",
    )
    ridge: float = _value(1e-2, float, "curvature, down: added to second moments, relative to their mean diagonal")
    align: str | None = _choice(
        None,
        ("none", "weights", "activations"),
        "grouped, soft: bring neurons into a common order first (default: activations with a fit or a calibrated "
        "curvature, else none)",
    )
    down: str | None = _choice(
        None,
        ("merge", "refit"),
        "grouped: down_proj merged like gate and up, or refitted in closed form to the original layer's output "
        "(default: refit with a fit, else merge)",
    )
    target: str | None = _choice(
        None,
        ("layer", "model"),
        "grouped: what a fit or refit of a layer aims at. layer: the routed output that the original layer gives to "
        "what it now hears; model: the original model's hidden states, so that a layer makes up for those below it "
        "(default: layer; model is a little better on what the calibration shows, worse on other text)",
    )
    metric: str = _choice(
        "euclidean",
        ("euclidean", "calibrated"),
        "grouped: what players bargain over: their weights, or the errors on their calibration tokens",
    )
    power: str = _choice(
        "equal",
        ("equal", "usage", "loss"),
        "grouped: bargaining power: equal, by tokens received, by share of the loss without agreement",
    )
    calibration_data: str = _value(
        "packaged",
        str,
        "calibration text: packaged, a text file, a .jsonl file of messages or text, a folder of these, or a Hub data "
        "set; stored as a name",
    )
    calibration_tokens: int = _value(65536, int, "tokens of calibration text")
    calibrate: str = _choice(
        "after", ("after", "before"), "statistics of a layer taken after or before the layers below it are patched"
    )
    routing: str = _choice(
        "linear",
        ("linear", "cosine", "stable"),
        "how tokens find experts. linear: the pretrained router; cosine: by angle alone, in its directions; stable: by "
        "token id, the experts that it chose most often for that id in calibration text",
    )
    temperature: str | None = _choice(
        None,
        ("norms", "entropy"),
        "cosine: how sharp. norms: as the weights of router and norm say, without text; entropy: as decided as the "
        "linear router on calibration text (default: entropy where text is read anyway, else norms)",
    )
    disagreement: str = _choice(
        "zero",
        ("zero", "mean"),
        "what players get without agreement, and the step of the base expert then: none, or that of the plain mean",
    )
    base: str = _value(
        "shared",
        str,
        "base expert of the first MoE layer (camex: of every one): shared (mean slice of the shared expert), first "
        "(expert 0, as after upcycling one dense network), mean, index:K",
    )
    first_layer: str = _choice(
        "merged",
        ("merged", "sparse"),
        "the first MoE layer: merged around the first base expert like the others, or left a sparse block without one; "
        "the base expert's propagation begins with its experts either way",
    )
    granularity: str = _choice(
        "matrix", ("matrix", "expert"), "a game for each of gate, up and down, or one for the whole expert"
    )
    scale: str = _choice(
        "simplex", ("simplex", "lemma"), "weights that sum to 1, or the raw solution of the bargaining equation"
    )
    gamma: float = _value(1.0, float, "step size of the base expert's propagation")
    momentum: str = _choice(
        "none", ("none", "complex", "quaternion"), "momentum of the base expert's walk (paper eq. 11, section 5)"
    )
    beta: str | None = _value(
        None,
        str,
        "complex: 0.9, or 0.9,0.2618 (modulus, radians); quaternion: four numbers "
        "(default: 0.9, or the paper's 0.8,0.3,0.3,0.3)",
    )
    solver: str = _choice(
        "newton", ("newton", "ccp"), "of the bargaining equation; ccp: the paper's procedure, extra 'ccp'"
    )
    ccp_iterations: int = _value(
        None, int, "ccp: convex problems a game (default: 2; namex, which solves in one layer alone: 20)"
    )
    eta: float = _value(1.0, float, "soft: step size of the merge")
    renormalise: bool = _value(False, bool, "soft: divide the values of top-k by their sum (paper, appendix D.1)")
    segment: int | None = _value(
        None, int, "soft: tokens that share a merged expert (default: 64, unless every token has its own)"
    )
    top_k: int | None = _value(
        None, int, "soft: experts a token counts for (default: the model's own number; smear: all)"
    )
    routing_span: str | None = _choice(
        None,
        ("token", "all", "previous", "prompt"),
        "soft: whose routing a merged expert is made from. token: the token's own; or one for a causal segment, from "
        "all tokens before it, the segment before it, or (after the prompt) the prompt (default: token; all where "
        "'segment' is stated or the curvature is calibrated)",
    )
    every: int = _value(
        1, int, "namex-full: solve in every n-th MoE layer, reuse the weights of an agreement by expert index between"
    )
    seed: int = _value(
        0, int, "seed of the choice of calibration text; grouped: of batches, directions and experts at random"
    )
    device: str = _value("cpu", str, "torch device of the arithmetic; never stored in outputs")

    def __post_init__(self) -> None:
        if isinstance(self.beta, (int, float)) and not isinstance(self.beta, bool):  # YAML reads 0.9 as a number
            object.__setattr__(self, "beta", str(self.beta))
        for spec in fields(self):
            _check_value(spec.name, getattr(self, spec.name), spec.metadata, spec.default)
        for name in ("gamma", "eta", "ridge"):  # 1 and 1.0 are stored alike
            object.__setattr__(self, name, float(getattr(self, name)))
        _check_ranges(self)
        _imply(self)
        if self.fitted and self.target is None:
            object.__setattr__(self, "target", "layer")
        if self.routing == "cosine" and self.temperature is None:
            object.__setattr__(self, "temperature", "entropy" if self.calibrated else "norms")
        for rule in RULES:
            if rule.broken(self):
                found = ", ".join(f"{name}={getattr(self, name)}" for name in rule.fields)
                raise RecipeError(f"{rule.message}; found {found}", rule.fields)
        _ = self.complex_beta  # refuses what is none

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Build from plain values; unknown fields are refused with the list of known ones."""
        known = [spec.name for spec in fields(cls)]
        unknown = sorted(set(map(str, values)) - set(known))
        if unknown:
            hint = did_you_mean(unknown[0], known)
            raise RecipeError(f"unknown recipe field '{unknown[0]}'; accepted: {', '.join(known)}{hint}")
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> "Recipe":
        """Read a YAML mapping of fields; keyword arguments go before what the file says."""
        return cls.from_dict({**read_yaml(path), **overrides})

    def to_dict(self) -> dict[str, Any]:
        """All stored fields as plain values, in their order here."""
        return {name: value for name, value in asdict(self).items() if name not in UNSTORED}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @property
    def weights_by(self) -> str | None:
        """The weighting in force: the stated one, or what the method implies, which may be none."""
        if self.operator in ("random", "shared"):
            return None
        return self.weighting or ("usage" if self.operator == "keep" else IMPLIED.get(self.method))

    @property
    def own_class(self) -> bool:
        """Whether the result is of its family's patched class; otherwise it is a stock model."""
        if self.routing != "linear" or self.budget != "equal":
            return True
        return self.merge != "grouped" and self.method != "smoe"

    @property
    def has_base(self) -> bool:
        """Whether a base expert is stored in every MoE layer, the first one aside where it stays sparse."""
        return self.merge != "grouped" and self.method not in ("smear", "smoe")

    def stays_sparse(self, layer: int, layers: tuple[int, ...]) -> bool:
        """Whether a layer keeps its sparse block. Args: layers, the MoE layers of the model."""
        return self.first_layer == "sparse" and layer == layers[0]

    @property
    def propagates(self) -> bool:
        """Whether that base expert walks from layer to layer."""
        return self.has_base and self.method != "camex"

    @property
    def fitted(self) -> bool:
        """Whether anything is fitted to the original's hidden states."""
        return self.merge == "grouped" and (self.fit != "none" or self.down == "refit")

    @property
    def calibrated(self) -> bool:
        """Whether calibration text is read."""
        return (
            self.fit != "none"
            or self.grouping in ("damage", "outputs", "router")
            or self.curvature in ("calibrated", "diagonal")
            or self.align in ("weights", "activations")  # the first needs no text, but goes the same way
            or self.down == "refit"
            or self.metric == "calibrated"
            or self.routing == "stable"
            or self.temperature == "entropy"
            or self.weights_by in ("usage", "saliency")
            or self.power == "usage"
        )

    @property
    def complex_beta(self) -> complex:
        """The momentum coefficient, of a quaternion its complex equivalent; 0 without momentum.

        Raises:
            RecipeError: a beta of another form, or of modulus 1 or more.
        """
        try:
            return parse_momentum(self.momentum, self.beta).complex_beta
        except ValueError as error:
            raise RecipeError(f"recipe field 'beta'{str(error).removeprefix('beta')}") from error

    @property
    def base_index(self) -> int | None:
        """Which expert the base is copied from, if it is one."""
        if self.base == "first":
            return 0
        return int(self.base.removeprefix("index:")) if self.base.startswith("index:") else None


@dataclass(frozen=True)
class Rule:
    """Choices that mean nothing together: when ``broken``, the message says why and which fields to look at."""

    broken: Callable[[Recipe], bool]
    message: str
    fields: tuple[str, ...]


def _rules_for(
    names: tuple[str, ...], applies: Callable[[Recipe], bool], why: str, shown: tuple[str, ...]
) -> list[Rule]:
    """Fields that may differ from their defaults only where they apply."""

    def broken_for(name: str) -> Callable[[Recipe], bool]:
        default = next(spec.default for spec in fields(Recipe) if spec.name == name)
        return lambda recipe: not applies(recipe) and getattr(recipe, name) != default

    return [Rule(broken_for(name), f"'{name}' {why}", (*shown, name)) for name in names]


RULES: tuple[Rule, ...] = (
    Rule(
        lambda r: r.merge == "grouped" and r.method != "smoe" and r.experts is None,
        "merge 'grouped' needs 'experts', the number that stays",
        ("experts",),
    ),
    Rule(
        lambda r: r.method == "smoe" and r.merge != "residual",
        "method 'smoe' merges nothing: it leaves the experts and 'merge' alone",
        ("method", "merge"),
    ),
    Rule(
        lambda r: r.merge == "grouped" and r.method == "namex",
        "method 'namex' reuses weights across layers, whose groups differ: use 'namex-full' or 'ep-camex'",
        ("method", "merge"),
    ),
    Rule(
        lambda r: r.merge == "grouped" and r.method == "camex",
        "method 'camex' weights experts by the input, and without data nothing routes it inside a group: its plain "
        "average is 'ep-camex'",
        ("method", "merge"),
    ),
    Rule(
        lambda r: r.merge == "residual" and r.method == "smear",
        "method 'smear' has no base expert to take the mass that top-k leaves over: it needs merge 'soft'",
        ("method", "merge"),
    ),
    Rule(
        lambda r: r.merge == "grouped" and r.method == "smear",
        "method 'smear' merges all experts of a layer by the input, not a group without data: it needs merge 'soft'",
        ("method", "merge"),
    ),
    *_rules_for(
        ("experts", "budget", "weighting", "operator", "fit", "grouping", "down", "metric", "power"),
        lambda r: r.merge == "grouped",
        "belongs to merge 'grouped'",
        ("merge",),
    ),
    *_rules_for(
        ("curvature", "align"),
        lambda r: r.merge in ("grouped", "soft"),
        "belongs to merge 'grouped' or 'soft'",
        ("merge",),
    ),
    *_rules_for(
        ("budget",),
        lambda r: r.calibrated and r.routing == "linear",
        "is measured on calibration text and keeps the linear router: it needs a fit, or what else reads text, and "
        "routing 'linear'",
        ("fit", "routing"),
    ),
    Rule(
        lambda r: r.operator != "merge" and (r.curvature != "identity" or r.align != "none"),
        "'curvature' and 'align' say how experts are merged: they belong to operator 'merge'",
        ("operator", "curvature", "align"),
    ),
    Rule(
        lambda r: r.operator != "merge" and r.method != "namex-full",
        "'method' says how experts are merged: it belongs to operator 'merge'",
        ("operator", "method"),
    ),
    Rule(
        lambda r: r.operator == "keep" and r.weights_by not in ("usage", "saliency"),
        "operator 'keep' retains the weightiest expert: 'weighting' is usage or saliency",
        ("operator", "weighting"),
    ),
    Rule(
        lambda r: r.operator in ("random", "shared") and r.weighting is not None,
        "operators 'random' and 'shared' weigh no experts: they go without 'weighting'",
        ("operator", "weighting"),
    ),
    Rule(
        lambda r: r.operator in ("random", "shared") and r.fit == "none",
        "operators 'random' and 'shared' are controls of a fit: they need one",
        ("operator", "fit"),
    ),
    Rule(
        lambda r: r.grouping == "none" and r.operator != "keep",
        "grouping 'none' keeps the weightiest experts of a layer: it needs operator 'keep'",
        ("grouping", "operator"),
    ),
    *_rules_for(
        ("seed",),
        lambda r: r.merge == "grouped" or r.calibrated or r.curvature == "kronecker",
        "belongs to merge 'grouped', to curvature 'kronecker' and to recipes that read calibration text",
        ("merge", "curvature"),
    ),
    Rule(
        lambda r: r.merge == "soft" and r.curvature == "diagonal",
        "curvature 'diagonal' belongs to merge 'grouped': under 'soft' the directions of 'calibrated' measured better",
        ("merge", "curvature"),
    ),
    Rule(
        lambda r: r.merge == "grouped" and r.curvature == "kronecker",
        "curvature 'kronecker' is trained where experts are merged in the forward pass: it needs merge 'soft'",
        ("merge", "curvature"),
    ),
    *_rules_for(
        ("rank",),
        lambda r: r.merge == "soft" and r.curvature in ("calibrated", "kronecker"),
        "belongs to merge 'soft' with curvature 'calibrated' or 'kronecker'",
        ("merge", "curvature"),
    ),
    *_rules_for(
        ("temperature",),
        lambda r: r.routing == "cosine",
        "belongs to routing 'cosine'",
        ("routing",),
    ),
    Rule(
        lambda r: r.merge == "soft" and r.curvature == "calibrated" and r.eta > 1,
        "curvature 'calibrated' weighs the base expert by 1 - eta sum s, which 'eta' above 1 may make negative",
        ("curvature", "eta"),
    ),
    *_rules_for(
        ("fit_steps",),
        lambda r: r.fit != "none",
        "belongs to a fit",
        ("fit",),
    ),
    *_rules_for(
        ("target",),
        lambda r: r.fitted,
        "belongs to a fit or a refitted down_proj",
        ("fit", "down"),
    ),
    Rule(
        lambda r: r.target == "model" and r.calibrate == "before",
        "target 'model' makes up for the errors of the layers below, which calibrate 'before' does not hear",
        ("target", "calibrate"),
    ),
    *_rules_for(
        ("ridge",),
        lambda r: r.curvature in ("calibrated", "diagonal") or r.down == "refit",
        "belongs to a curvature or a refitted down_proj",
        ("curvature", "down"),
    ),
    *_rules_for(
        ("calibration_data", "calibration_tokens", "calibrate"),
        lambda r: r.calibrated,
        "belongs to a recipe that reads calibration text",
        ("merge", "fit", "curvature", "grouping", "routing"),
    ),
    *_rules_for(
        ("segment", "top_k", "routing_span"),
        lambda r: r.merge == "soft",
        "belongs to merge 'soft'",
        ("merge",),
    ),
    Rule(
        lambda r: r.routing_span == "token" and r.segment is not None,
        "under routing_span 'token' every token has its own merged expert: 'segment' belongs to the other spans",
        ("routing_span", "segment"),
    ),
    Rule(
        lambda r: r.routing_span == "token" and r.curvature == "calibrated",
        "curvature 'calibrated' is no linear function of a token's routing: it needs segments, routing_span 'all', "
        "'previous' or 'prompt'",
        ("routing_span", "curvature"),
    ),
    *_rules_for(
        ("eta", "renormalise"),
        lambda r: r.merge == "soft" and r.has_base,
        "belongs to merge 'soft' with a base expert",
        ("merge", "method"),
    ),
    *_rules_for(
        ("beta",),
        lambda r: r.momentum != "none",
        "belongs to a momentum",
        ("momentum",),
    ),
    *_rules_for(
        ("base",),
        lambda r: r.has_base,
        "is a choice of the base expert, which this recipe does not have",
        ("merge", "method"),
    ),
    *_rules_for(
        ("first_layer",),
        lambda r: r.merge in ("residual", "soft") and r.method != "smoe",
        "belongs to merge 'residual' or 'soft' and a method that merges",
        ("merge", "method"),
    ),
    *_rules_for(
        ("gamma", "momentum"),
        lambda r: r.propagates,
        "is a choice of the propagated base expert, which this recipe does not have",
        ("merge", "method"),
    ),
    *_rules_for(
        ("every",),
        lambda r: r.propagates and r.method == "namex-full",
        "belongs to method 'namex-full' and a propagated base expert",
        ("merge", "method"),
    ),
    *_rules_for(
        ("disagreement", "granularity", "scale", "solver", "metric", "power"),
        lambda r: r.weights_by == "nash",
        "is a choice of the Nash bargain, which this recipe does not play",
        ("method",),
    ),
    Rule(
        lambda r: r.solver != "ccp" and r.ccp_iterations != CCP_ITERATIONS,
        "'ccp_iterations' belongs to solver 'ccp'",
        ("solver", "ccp_iterations"),
    ),
    Rule(
        lambda r: r.solver == "ccp" and r.disagreement == "mean",
        "solver 'ccp' was published for the zero disagreement point alone",
        ("solver", "disagreement"),
    ),
    Rule(
        lambda r: r.solver == "ccp" and (r.power != "equal" or r.metric != "euclidean"),
        "solver 'ccp' was published for equal power and a game over weights",
        ("solver", "power", "metric"),
    ),
    Rule(
        lambda r: r.metric == "calibrated" and r.curvature != "calibrated",
        "metric 'calibrated' bargains over the errors of curvature 'calibrated': it needs that",
        ("metric", "curvature"),
    ),
    Rule(
        lambda r: r.metric == "calibrated" and r.granularity != "matrix",
        "metric 'calibrated' plays a game for each matrix: inputs of gate, up and down differ",
        ("metric", "granularity"),
    ),
    Rule(
        lambda r: r.power == "loss" and r.metric != "calibrated",
        "power 'loss' is a share of the losses that metric 'calibrated' knows",
        ("power", "metric"),
    ),
    Rule(
        lambda r: r.merge == "grouped" and r.scale == "lemma",
        "merge 'grouped' replaces its members, so its weights are a share of each: scale 'lemma' has no meaning there",
        ("merge", "scale"),
    ),
)


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


def _imply(recipe: Recipe) -> None:
    """Give the fields that are not stated their values."""
    if recipe.merge != "soft" and recipe.routing_span == "all" and recipe.segment in (None, 64):
        for name in ("segment", "routing_span"):  # what releases before 0.2.0 stored under every merge
            object.__setattr__(recipe, name, None)
    for name, value in _implied(recipe).items():
        if getattr(recipe, name) is None:
            object.__setattr__(recipe, name, value)


def _implied(recipe: Recipe) -> dict[str, Any]:
    """What fields are where they are not stated."""
    one_layer = recipe.solver == "ccp" and recipe.method == "namex"
    implied: dict[str, Any] = {"ccp_iterations": CCP_BUDGET if one_layer else CCP_ITERATIONS}
    if recipe.merge == "grouped":
        implied |= {name: pair[recipe.fit != "none"] for name, pair in IMPLIED_BY_FIT.items()}
        return implied if recipe.operator == "merge" else {**implied, "curvature": "identity", "align": "none"}
    if recipe.merge == "soft":
        curvature = recipe.curvature or "identity"
        by_segment = recipe.segment is not None or curvature == "calibrated"
        span = recipe.routing_span or ("all" if by_segment else "token")
        implied |= {"curvature": curvature, "routing_span": span, "segment": None if span == "token" else 64}
        implied |= IMPLIED_BY_CURVATURE.get(curvature, {})
    return implied


def _check_value(name: str, value: Any, spec: Mapping[str, Any], default: Any) -> None:
    if value is None and (default is None or default is MISSING):
        return
    if "choices" in spec:
        if value not in spec["choices"]:
            hint = did_you_mean(value, spec["choices"])
            raise RecipeError(f"recipe field '{name}' is {value!r}; accepted: {', '.join(spec['choices'])}{hint}")
        return
    kind = spec["kind"]
    if kind is bool:
        if not isinstance(value, bool):
            raise RecipeError(f"recipe field '{name}' is {value!r}; accepted: true, false")
        return
    accepted = (int, float) if kind is float else kind
    known = isinstance(value, accepted) and not isinstance(value, bool)
    if not known or (kind is float and not abs(value) <= sys.float_info.max):
        raise RecipeError(f"recipe field '{name}' is {value!r}; accepted: a finite {kind.__name__}")


def _check_ranges(recipe: Recipe) -> None:
    for name in ("gamma", "eta", "ridge"):
        if not 0 < getattr(recipe, name) <= LARGEST:
            raise RecipeError(
                f"recipe field '{name}' is {getattr(recipe, name)}; accepted: a number above 0, up to {LARGEST:g}"
            )
    for name, most in MOST.items():
        number = getattr(recipe, name)
        if number is not None and not 1 <= number <= most:
            raise RecipeError(f"recipe field '{name}' is {number}; accepted: a whole number from 1 to {most}")
    if not 0 <= recipe.seed < 1 << 64:
        raise RecipeError(f"recipe field 'seed' is {recipe.seed}; accepted: a whole number from 0 below 2**64")
    if not BASES.fullmatch(recipe.base):
        raise RecipeError(
            f"recipe field 'base' is {recipe.base!r}; accepted: shared, first, mean, index:K with K from 0"
        )
