"""The parts that merges have in common, and those beside the merge: each the choices of one subject."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ..errors import RecipeError
from .choices import (
    Align,
    Calibrate,
    CurvatureKind,
    Disagreement,
    ErrorWeights,
    FitKind,
    Granularity,
    Metric,
    MomentumKind,
    Power,
    RoutingKind,
    Scale,
    Solver,
    Temperature,
)
from .momentum import complex_beta
from .part import FACTOR, Part, Range, Rule, count_to, leaf

CCP_ITERATIONS = 2
"""Convex problems a game under solver ``ccp``."""
TOKENS = 65536
"""Of calibration text, where nothing asks for more."""
STORED = {"calibration_tokens": TOKENS, "calibrate": "after"}
"""What recipes imply that read text, but for narrow ones; stored whether text is read or not."""
BASES = re.compile(r"shared|first|mean|index:[0-9]{1,9}")


@dataclass(frozen=True, kw_only=True)
class Game(Part):
    """The rules of the Nash bargain between the experts of a layer or a group (paper Lemma 3.2)."""

    belongs = "is a choice of the Nash bargain, which this recipe does not play"
    shown = ("method",)

    disagreement: Disagreement = leaf(
        "zero",
        "what players get without agreement, and the step of the base expert then: none, or that of the plain mean",
    )
    granularity: Granularity = leaf("matrix", "a game for each of gate, up and down, or one for the whole expert")
    scale: Scale = leaf("simplex", "weights that sum to 1, or the raw solution of the bargaining equation")
    solver: Solver = leaf("newton", "of the bargaining equation; ccp: the paper's procedure, extra 'ccp'")
    ccp_iterations: int | None = leaf(
        None,
        "ccp: convex problems a game (default: 2; namex, which solves in one layer alone: 20)",
        within=count_to(10_000),
        belongs="belongs to solver 'ccp'",
        shown=("solver",),
    )

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            lambda game: game.solver == "ccp" and game.disagreement == "mean",
            "solver 'ccp' was published for the zero disagreement point alone",
            ("solver", "disagreement"),
        ),
    )

    def unused(self) -> Iterator[str]:
        if self.solver != "ccp":
            yield "ccp_iterations"


@dataclass(frozen=True, kw_only=True)
class GroupGame(Game):
    """The game inside a group of experts that become one."""

    metric: Metric = leaf(
        "euclidean",
        "grouped: what players bargain over: their weights, or the errors on their calibration tokens",
    )
    power: Power = leaf(
        "equal", "grouped: bargaining power: equal, by tokens received, by share of the loss without agreement"
    )

    rules: ClassVar[tuple[Rule, ...]] = (
        *Game.rules,
        Rule(
            lambda game: game.solver == "ccp" and (game.power != "equal" or game.metric != "euclidean"),
            "solver 'ccp' was published for equal power and a game over weights",
            ("solver", "power", "metric"),
        ),
        Rule(
            lambda game: game.metric == "calibrated" and game.granularity != "matrix",
            "metric 'calibrated' plays a game for each matrix: inputs of gate, up and down differ",
            ("metric", "granularity"),
        ),
        Rule(
            lambda game: game.power == "loss" and game.metric != "calibrated",
            "power 'loss' is a share of the losses that metric 'calibrated' knows",
            ("power", "metric"),
        ),
    )

    @property
    def needs_text(self) -> bool:
        return self.metric == "calibrated" or self.power == "usage"


@dataclass(frozen=True, kw_only=True)
class BaseExpert(Part):
    """Where the base expert of the first MoE layer comes from."""

    belongs = "is a choice of the base expert, which this recipe does not have"
    shown = ("merge", "method")

    base: str = leaf(
        "shared",
        "base expert of the first MoE layer (camex: of every one): shared (mean slice of the shared expert), first "
        "(expert 0, as after upcycling one dense network), mean, index:K",
        within=Range(lambda base: BASES.fullmatch(base) is not None, "shared, first, mean, index:K with K from 0"),
    )

    @property
    def index(self) -> int | None:
        """Which expert the base is copied from, if it is one."""
        if self.base == "first":
            return 0
        return int(self.base.removeprefix("index:")) if self.base.startswith("index:") else None


@dataclass(frozen=True, kw_only=True)
class Propagation(Part):
    """How the base expert goes on from a MoE layer to the next (paper eq. 7, 9 and 11)."""

    belongs = "is a choice of the propagated base expert, which this recipe does not have"
    shown = ("merge", "method")

    gamma: float = leaf(1.0, "step size of the base expert's propagation", within=FACTOR)
    momentum: MomentumKind = leaf("none", "momentum of the base expert's walk (paper eq. 11, section 5)")
    beta: str | None = leaf(
        None,
        "complex: 0.9, or 0.9,0.2618 (modulus, radians); quaternion: four numbers "
        "(default: 0.9, or the paper's 0.8,0.3,0.3,0.3)",
        belongs="belongs to a momentum",
        shown=("momentum",),
    )
    every: int = leaf(
        1,
        "namex-full: solve in every n-th MoE layer, reuse the weights of an agreement by expert index between",
        within=count_to(10_000),
        belongs="belongs to method 'namex-full' and a propagated base expert",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.complex_beta  # refuses a beta of another form

    def unused(self) -> Iterator[str]:
        if self.momentum == "none":
            yield "beta"

    @property
    def complex_beta(self) -> complex:
        """The momentum coefficient, of a quaternion its complex equivalent; 0 without momentum.

        Raises:
            RecipeError: a beta of another form, or of modulus 1 or more.
        """
        try:
            return complex_beta(self.momentum, self.beta)
        except ValueError as error:
            raise RecipeError(f"recipe field 'beta'{str(error).removeprefix('beta')}") from error


@dataclass(frozen=True, kw_only=True)
class Curvature(Part):
    """What a change of a matrix counts for, and the common order of neurons in which matrices are compared."""

    kind: CurvatureKind = leaf(
        None,
        "grouped, soft: what a change of a matrix counts for. identity: its size; calibrated: the error on what the "
        "expert sees in calibration text; diagonal (grouped): the same, input by input; kronecker (soft): trainable, "
        "the identity until it is trained (default: calibrated with a fit, else identity)",
        name="curvature",
    )
    align: Align = leaf(
        None,
        "grouped, soft: bring neurons into a common order first (default: activations with a fit or a calibrated "
        "curvature, else none)",
    )
    rank: int | None = leaf(
        None,
        "soft; curvature calibrated: leading directions of the inputs kept of every expert (default: 4); kronecker: "
        "products summed up (default: 1)",
        within=count_to(1 << 20),
        belongs="belongs to merge 'soft' with curvature 'calibrated' or 'kronecker'",
        shown=("merge", "curvature"),
    )
    ridge: float = leaf(
        1e-2,
        "curvature, down: added to second moments, relative to their mean diagonal",
        within=FACTOR,
        belongs="belongs to a curvature or a refitted down_proj",
        shown=("curvature", "down"),
    )

    @property
    def measured(self) -> bool:
        """Whether second moments of inputs on calibration text are the curvature."""
        return self.kind in ("calibrated", "diagonal")

    @property
    def needs_text(self) -> bool:
        return self.measured or self.align in ("weights", "activations")  # weights need none, but go the same way


@dataclass(frozen=True, kw_only=True)
class Fit(Part):
    """How a layer of fewer experts is fitted to the original's output on calibration text."""

    kind: FitKind = leaf(
        "none",
        "grouped, narrow: fit to the original on calibration text. router: the router's rows, of grouped; layer: rows, "
        "experts and the shared expert. Under grouped a fit makes calibrated merging the default of curvature, align, "
        "grouping and down",
        name="fit",
    )
    steps: int = leaf(
        1000,
        "fit: steps of an optimiser a layer; the best on held-out tokens are kept",
        name="fit_steps",
        within=count_to(10_000_000),
        belongs="belongs to a fit",
        shown=("fit",),
    )

    def unused(self) -> Iterator[str]:
        if self.kind == "none":
            yield "fit_steps"

    @property
    def needs_text(self) -> bool:
        return self.kind != "none"


@dataclass(frozen=True, kw_only=True)
class Routing(Part):
    """How tokens find experts."""

    kind: RoutingKind = leaf(
        "linear",
        "how tokens find experts. linear: the pretrained router; cosine: by angle alone, in its directions; stable: by "
        "token id, the experts that it chose most often for that id in calibration text",
        name="routing",
    )
    temperature: Temperature | None = leaf(
        None,
        "cosine: how sharp. norms: as the weights of router and norm say, without text; entropy: as decided as the "
        "linear router on calibration text (default: entropy where text is read anyway, else norms)",
        belongs="belongs to routing 'cosine'",
        shown=("routing",),
    )

    def unused(self) -> Iterator[str]:
        if self.kind != "cosine":
            yield "temperature"

    @property
    def needs_text(self) -> bool:
        return self.kind == "stable" or self.temperature == "entropy"


@dataclass(frozen=True, kw_only=True)
class Calibration(Part):
    """The calibration text, and when a layer's statistics are taken."""

    belongs = "belongs to a recipe that reads calibration text"
    shown = ("merge", "fit", "curvature", "grouping", "routing")

    data: str = leaf(
        "packaged",
        "calibration text: packaged, a text file, a .jsonl file of messages or text, a folder of these, a .npy file of "
        "token ids, or a Hub data set; stored as a name",
        name="calibration_data",
    )
    tokens: int = leaf(
        None,
        "tokens of calibration text (default: 65536; narrow: 32 for every neuron of an expert, 48 with a fit, and no "
        "fewer than that)",
        name="calibration_tokens",
        within=count_to(1 << 40),
    )
    when: Calibrate = leaf(
        None,
        "statistics of a layer taken after or before the layers below it are patched (default: after; narrow without a "
        "fit: before)",
        name="calibrate",
    )
    error_weights: ErrorWeights = leaf(
        "none",
        "grouped, narrow: how errors on calibration text count. none: as they are; source: every file or data set as "
        "much as the others; sequence: every sequence as much as the others, which costs exact answers",
        belongs="belongs to merge 'grouped' or 'narrow' on calibration text",
        shown=("merge", "fit"),
    )
