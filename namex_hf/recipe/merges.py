"""The merges: where the merged expert acts, with the choices that each has."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from .choices import (
    IMPLIED_WEIGHTINGS,
    FirstLayer,
    MergeKind,
    Method,
    RoutingSpan,
)
from .part import FACTOR, Part, Rule, all_leaves, count_to, leaf
from .parts import CCP_ITERATIONS, BaseExpert, Curvature, Game, Propagation

CCP_BUDGET = 20
"""The paper's budget of convex problems a pass, which method ``namex`` spends in one layer."""
SEGMENT = 64
"""Tokens of a segment under ``soft``, where segments are and their length is not stated."""


def names_of(part: type[Part]) -> Iterator[str]:
    """Flat names of a part's fields."""
    return (one.name for one in all_leaves(part))


@dataclass(frozen=True, kw_only=True)
class Merge(Part):
    """What all merges answer."""

    kind: ClassVar[MergeKind]
    rewrites: ClassVar[bool] = False
    """Whether the result has other routed experts, fewer or smaller."""
    method: Method = leaf(
        "namex-full",
        "how weights and base come about. namex-full: a Nash bargain in every layer; namex: one at the first layer "
        "that agrees, reused; ep-camex: plain mean; camex: every layer has a base of its own; smear: no base, all "
        "experts merged by the router; smoe: no merging, the sparse original",
    )

    def flat(self) -> dict[str, Any]:
        return {"merge": self.kind, **super().flat()}

    @property
    def weights_by(self) -> str | None:
        """The weighting of experts in force, which may be none."""
        return IMPLIED_WEIGHTINGS.get(self.method)

    @property
    def has_base(self) -> bool:
        """Whether a base expert is stored in every MoE layer, the first one aside where it stays sparse."""
        return False

    @property
    def propagates(self) -> bool:
        """Whether the base expert goes on from layer to layer."""
        return False

    def steps(self, on_text: bool) -> Iterator[str]:
        """What is done to every layer, by the names of `patching.steps`; the router's form aside."""
        if on_text:
            yield "observe"

    def stays_sparse(self, layer: int, layers: tuple[int, ...]) -> bool:
        """Whether a layer keeps its sparse block. Args: layers, the MoE layers of the model."""
        return False


@dataclass(frozen=True, kw_only=True)
class Nothing(Merge):
    """``method: smoe``: the sparse original, of which the router alone may be replaced."""

    kind: ClassVar[MergeKind] = "residual"
    method: Method = leaf("smoe", "no merging")


MERGES_NOTHING = Rule(
    lambda merge: merge.method == "smoe",
    "method 'smoe' merges nothing: it leaves the experts and 'merge' alone",
    ("method", "merge"),
)


@dataclass(frozen=True, kw_only=True)
class AroundBase(Merge):
    """A merge around a base expert, which goes on from layer to layer."""

    game: Game = Game()
    base: BaseExpert = BaseExpert()
    propagation: Propagation = Propagation()
    first_layer: FirstLayer = leaf(
        "merged",
        "the first MoE layer: merged around the first base expert like the others, or left a sparse block without one; "
        "the base expert's propagation begins with its experts either way",
    )

    def imply(self) -> None:
        if self.game.solver == "ccp" and self.game.ccp_iterations is None:
            iterations = CCP_BUDGET if self.method == "namex" else CCP_ITERATIONS
            self._set("game", replace(self.game, ccp_iterations=iterations))

    def unused(self) -> Iterator[str]:
        if self.weights_by != "nash":
            yield from names_of(Game)
        if not self.has_base:
            yield from names_of(BaseExpert)
        if not self.propagates:
            yield from names_of(Propagation)
        if self.method != "namex-full":
            yield "every"

    @property
    def has_base(self) -> bool:
        return self.method != "smear"

    @property
    def propagates(self) -> bool:
        return self.has_base and self.method != "camex"

    def steps(self, on_text: bool) -> Iterator[str]:
        yield from super().steps(on_text)
        if self.has_base:
            yield "propagate"

    def solves_at(self, position: int) -> bool:
        """Whether all games are solved at the ``position``-th MoE layer, or the weights of agreements reused."""
        return position == 0 if self.method == "namex" else position % self.propagation.every == 0

    @property
    def curved_step(self) -> bool:
        """Whether M_i acts in the base expert's step once it is trained (paper eq. 3); NAMEx drops it there (eq. 7)."""
        return False

    def stays_sparse(self, layer: int, layers: tuple[int, ...]) -> bool:
        return self.first_layer == "sparse" and layer == layers[0]


@dataclass(frozen=True, kw_only=True)
class Residual(AroundBase):
    """Top-k experts stay, and the base expert takes the mass that top-k leaves over."""

    kind: ClassVar[MergeKind] = "residual"
    rules: ClassVar[tuple[Rule, ...]] = (
        MERGES_NOTHING,
        Rule(
            lambda merge: merge.method == "smear",
            "method 'smear' has no base expert to take the mass that top-k leaves over: it needs merge 'soft'",
            ("method", "merge"),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Soft(AroundBase):
    """Every token, or segment, goes through its own merged expert (paper eq. 9)."""

    kind: ClassVar[MergeKind] = "soft"
    curvature: Curvature = Curvature()
    eta: float = leaf(
        1.0,
        "soft: step size of the merge",
        within=FACTOR,
        belongs="belongs to merge 'soft' with a base expert",
        shown=("merge", "method"),
    )
    renormalise: bool = leaf(
        False,
        "soft: divide the values of top-k by their sum (paper, appendix D.1)",
        belongs="belongs to merge 'soft' with a base expert",
        shown=("merge", "method"),
    )
    segment: int | None = leaf(
        None,
        "soft: tokens that share a merged expert (default: 64, unless every token has its own)",
        within=count_to(1 << 31),
    )
    top_k: int | None = leaf(
        None,
        "soft: experts a token counts for (default: the model's own number; smear: all)",
        within=count_to(1 << 20),
    )
    routing_span: RoutingSpan = leaf(
        None,
        "soft: whose routing a merged expert is made from. token: the token's own; or one for a causal segment, from "
        "all tokens before it, the segment before it, or (after the prompt) the prompt (default: token; all where "
        "'segment' is stated or the curvature is calibrated)",
    )

    rules: ClassVar[tuple[Rule, ...]] = (
        MERGES_NOTHING,
        Rule(
            lambda merge: merge.curvature.kind == "diagonal",
            "curvature 'diagonal' belongs to merge 'grouped': under 'soft' the directions of 'calibrated' measured "
            "better",
            ("merge", "curvature"),
        ),
        Rule(
            lambda merge: merge.curvature.kind == "calibrated" and merge.eta > 1,
            "curvature 'calibrated' weighs the base expert by 1 - eta sum s, which 'eta' above 1 may make negative",
            ("curvature", "eta"),
        ),
        Rule(
            lambda merge: merge.routing_span == "token" and merge.segment is not None,
            "under routing_span 'token' every token has its own merged expert: 'segment' belongs to the other spans",
            ("routing_span", "segment"),
        ),
        Rule(
            lambda merge: merge.routing_span == "token" and merge.curvature.kind == "calibrated",
            "curvature 'calibrated' is no linear function of a token's routing: it needs segments, routing_span 'all', "
            "'previous' or 'prompt'",
            ("routing_span", "curvature"),
        ),
    )

    @property
    def curved_step(self) -> bool:
        return self.method == "ep-camex" and self.curvature.kind == "kronecker"

    def steps(self, on_text: bool) -> Iterator[str]:
        if self.curvature.align != "none":
            yield "align"
        yield from super().steps(on_text)
        if self.curvature.rank is not None:
            yield "curve"

    def imply(self) -> None:
        super().imply()
        calibrated, trained = self.curvature.kind == "calibrated", self.curvature.kind == "kronecker"
        rank = 4 if calibrated else 1 if trained else None
        align = "activations" if calibrated else "none"
        self._set("curvature", self.curvature.filled(kind="identity", align=align, rank=rank))
        self._fill(routing_span="all" if self.segment is not None or calibrated else "token")
        if self.routing_span != "token":
            self._fill(segment=SEGMENT)

    def unused(self) -> Iterator[str]:
        yield from super().unused()
        if not self.has_base:
            yield from ("eta", "renormalise")
        if self.curvature.kind not in ("calibrated", "kronecker"):
            yield "rank"
        if not self.curvature.measured:
            yield "ridge"
