"""The merges that make a smaller checkpoint: fewer experts, or narrower ones."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from .choices import (
    IMPLIED_WEIGHTINGS,
    WEIGHTINGS,
    Budget,
    Down,
    Grouping,
    MergeKind,
    Method,
    Neurons,
    Operator,
    Target,
)
from .merges import MERGES_NOTHING, Merge, names_of
from .part import Range, Rule, count_to, leaf
from .parts import Curvature, Fit, GroupGame


@dataclass(frozen=True, kw_only=True)
class Smaller(Merge):
    """Routed experts become fewer or smaller."""

    rewrites: ClassVar[bool] = True
    fit: Fit = Fit()
    keep: float | None = leaf(
        None,
        "grouped, narrow: the share of the routed parameters that stays, in place of 'experts' or 'width'; without "
        "'merge' it means narrow. A number of experts is rounded down, a width to a multiple of 128, or of 64 to 4",
        within=Range(lambda share: 0 < share < 1, "a number above 0 and below 1"),
    )
    width: int | None = leaf(
        None,
        "narrow: how many neurons stay in every routed expert; grouped: how many stay in every expert that is left "
        "(default: all)",
        within=count_to(1 << 20),
    )
    neurons: Neurons = leaf(
        "second_order",
        "grouped with a width, narrow: how the neurons that stay are chosen on calibration text. second_order: one "
        "goes after another, each time the one whose loss the others' down_proj makes up for best; energy: those of "
        "the largest outputs stay; gradient: those on which the loss depends most, under narrow, of small models; "
        "random: a control. down_proj is refitted in closed form in any case",
        belongs="belongs to a 'width'",
        shown=("merge", "width"),
    )


@dataclass(frozen=True, kw_only=True)
class Grouped(Smaller):
    """Experts are clustered and each group becomes one: a smaller checkpoint."""

    kind: ClassVar[MergeKind] = "grouped"
    game: GroupGame = GroupGame()
    curvature: Curvature = Curvature()
    weighting: str | None = leaf(
        None,
        "grouped: weights inside a group (default: what the method implies; where experts are kept, usage). usage: "
        "tokens received; saliency: mean over them of gate value times norm of the answer",
        registry=WEIGHTINGS,
    )
    operator: Operator = leaf(
        "merge",
        "grouped: what a group becomes. merge: one expert of all; keep: its weightiest expert, the others are pruned; "
        "random, shared: controls of a fit, that begins at random experts or at slices of the shared one",
    )
    experts: int = leaf(None, "grouped: how many experts stay in every layer", within=count_to(1 << 20))
    budget: Budget = leaf(
        "equal",
        "grouped, with calibration text: equal: every layer keeps 'experts'; damage: all together keep as many, more "
        "where fewer would cost the model more, as measured on the text; the result is of a class of its own",
    )
    grouping: Grouping = leaf(
        None,
        "grouped: how groups are found. damage: least added error of the output on calibration text (Ward); outputs, "
        "router, weights: average linkage of mean outputs, gate values, weights; none: no groups, the weightiest "
        "experts of the layer are kept (default: damage with a fit, else weights)",
    )
    down: Down = leaf(
        None,
        "grouped: down_proj merged like gate and up, or refitted in closed form to the original layer's output "
        "(default: refit with a fit, else merge)",
    )
    target: Target | None = leaf(
        None,
        "grouped: what a fit or refit of a layer aims at. layer: the routed output that the original layer gives to "
        "what it now hears; model: the original model's hidden states, so that a layer makes up for those below it "
        "(default: layer; model is a little better on what the calibration shows, worse on other text)",
        belongs="belongs to a fit or a refitted down_proj",
        shown=("fit", "down"),
    )

    rules: ClassVar[tuple[Rule, ...]] = (
        MERGES_NOTHING,
        Rule(
            lambda merge: (merge.experts is None) == (merge.keep is None),
            "merge 'grouped' needs 'experts', the number that stays, or 'keep', the share",
            ("experts", "keep"),
        ),
        Rule(
            lambda merge: merge.method == "namex",
            "method 'namex' reuses weights across layers, whose groups differ: use 'namex-full' or 'ep-camex'",
            ("method", "merge"),
        ),
        Rule(
            lambda merge: merge.method == "camex",
            "method 'camex' weights experts by the input, and without data nothing routes it inside a group: its plain "
            "average is 'ep-camex'",
            ("method", "merge"),
        ),
        Rule(
            lambda merge: merge.method == "smear",
            "method 'smear' merges all experts of a layer by the input, not a group without data: it needs merge "
            "'soft'",
            ("method", "merge"),
        ),
        Rule(
            lambda merge: (
                merge.operator != "merge" and (merge.curvature.kind != "identity" or merge.curvature.align != "none")
            ),
            "'curvature' and 'align' say how experts are merged: they belong to operator 'merge'",
            ("operator", "curvature", "align"),
        ),
        Rule(
            lambda merge: merge.operator != "merge" and merge.method != "namex-full",
            "'method' says how experts are merged: it belongs to operator 'merge'",
            ("operator", "method"),
        ),
        Rule(
            lambda merge: merge.operator == "keep" and merge.weights_by not in ("usage", "saliency"),
            "operator 'keep' retains the weightiest expert: 'weighting' is usage or saliency",
            ("operator", "weighting"),
        ),
        Rule(
            lambda merge: merge.is_control and merge.weighting is not None,
            "operators 'random' and 'shared' weigh no experts: they go without 'weighting'",
            ("operator", "weighting"),
        ),
        Rule(
            lambda merge: merge.is_control and merge.fit.kind == "none",
            "operators 'random' and 'shared' are controls of a fit: they need one",
            ("operator", "fit"),
        ),
        Rule(
            lambda merge: merge.width is not None and (merge.is_control or merge.budget != "equal"),
            "'width' narrows experts that were merged or kept, as many in every layer: 'operator' is merge or keep, "
            "'budget' equal",
            ("width", "operator", "budget"),
        ),
        Rule(
            lambda merge: merge.neurons == "gradient",
            "neurons 'gradient' are those of the original's experts: it needs merge 'narrow'",
            ("merge", "neurons"),
        ),
        Rule(
            lambda merge: merge.grouping == "none" and merge.operator != "keep",
            "grouping 'none' keeps the weightiest experts of a layer: it needs operator 'keep'",
            ("grouping", "operator"),
        ),
        Rule(
            lambda merge: merge.curvature.kind == "kronecker",
            "curvature 'kronecker' is trained where experts are merged in the forward pass: it needs merge 'soft'",
            ("merge", "curvature"),
        ),
        Rule(
            lambda merge: merge.game.metric == "calibrated" and merge.curvature.kind != "calibrated",
            "metric 'calibrated' bargains over the errors of curvature 'calibrated': it needs that",
            ("metric", "curvature"),
        ),
        Rule(
            lambda merge: merge.game.scale == "lemma",
            "merge 'grouped' replaces its members, so its weights are a share of each: scale 'lemma' has no meaning "
            "there",
            ("merge", "scale"),
        ),
    )

    def imply(self) -> None:
        fits = self.fit.kind != "none"
        merges = fits and self.operator == "merge"
        self._fill(grouping="damage" if fits else "weights", down="refit" if fits else "merge")
        kind, align = ("calibrated", "activations") if merges else ("identity", "none")
        self._set("curvature", self.curvature.filled(kind=kind, align=align))
        if self.fitted:
            self._fill(target="layer")

    def unused(self) -> Iterator[str]:
        yield "rank"
        if not (self.curvature.measured or self.down == "refit"):
            yield "ridge"
        if not self.fitted:
            yield "target"
        if self.width is None:
            yield "neurons"
        if self.weights_by != "nash":
            yield from names_of(GroupGame)

    def steps(self, on_text: bool) -> Iterator[str]:
        yield "shrink" if on_text else "group"

    @property
    def weighs_alone(self) -> bool:
        """Whether text is read for what experts weigh alone: nothing is fitted, matched or measured on its tokens."""
        plain = self.curvature.kind == "identity" and self.curvature.align == "none" and not self.fitted
        equal = self.budget == "equal" and self.game.metric == "euclidean"
        return plain and equal and self.width is None and self.grouping in ("weights", "none")

    @property
    def is_control(self) -> bool:
        """Whether groups become experts that know nothing of their members."""
        return self.operator in ("random", "shared")

    @property
    def weights_by(self) -> str | None:
        if self.is_control:
            return None
        return self.weighting or IMPLIED_WEIGHTINGS.get(self.operator) or super().weights_by

    @property
    def fitted(self) -> bool:
        """Whether anything is fitted to the original's hidden states."""
        return self.fit.kind != "none" or self.down == "refit"

    @property
    def needs_text(self) -> bool:
        weighted = self.weights_by is not None and WEIGHTINGS.get(self.weights_by, True)
        measured = self.grouping in ("damage", "outputs", "router")
        return super().needs_text or weighted or measured or self.down == "refit" or self.width is not None


@dataclass(frozen=True, kw_only=True)
class Narrow(Smaller):
    """Every expert and the router stay; of each expert the neurons that matter least go: a smaller checkpoint."""

    kind: ClassVar[MergeKind] = "narrow"
    method: Method = leaf("smoe", "no merging")
    sweeps: int | None = leaf(
        None,
        "narrow: how often the experts of a layer, one after another, are cut anew for what the others leave over of "
        "the layer's output, so that less is lost (default: 1 under neurons second_order without a fit, else 0)",
        within=Range(lambda count: 0 <= count <= 100, "a whole number from 0 to 100"),
    )
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            lambda merge: (merge.width is None) == (merge.keep is None),
            "merge 'narrow' needs 'width', the number of neurons that stay, or 'keep', the share",
            ("width", "keep"),
        ),
        Rule(
            lambda merge: merge.method != "smoe",
            "merge 'narrow' keeps every expert: 'method' says how experts are merged",
            ("merge", "method"),
        ),
        Rule(
            lambda merge: merge.fit.kind == "router",
            "merge 'narrow' keeps the router until the whole layer is fitted: 'fit' is none or layer",
            ("merge", "fit"),
        ),
    )

    def imply(self) -> None:
        self._fill(sweeps=int(self.neurons == "second_order" and self.fit.kind == "none"))

    def steps(self, on_text: bool) -> Iterator[str]:
        yield "narrow"

    @property
    def needs_text(self) -> bool:
        return True
