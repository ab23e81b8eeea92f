"""What a run will do, known and checked before the first tensor is read or a byte is written."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from ..calibration.sources import Texts
from ..calibration.text import CalibrationText
from ..checkpoint.header import TensorSpan
from ..checkpoint.layout import left_out, outline_in, per_expert
from ..checkpoint.shard import Item
from ..checkpoint.source import Checkpoint
from ..defaults import SMALL_BYTES
from ..errors import FamilyError, RecipeError, UsageError
from ..families import FAMILIES, Family, MoeShape, Reexpression, family_of
from ..families.check import check_block
from ..families.outline import Outline
from ..files import size_text
from ..models import remote_code
from ..models.soft_kronecker import kronecker_parameters
from ..recipe import Fit, Grouped, Narrow, Recipe, Smaller, Soft
from ..recipe.choices import FitKind
from .check import check_fit
from .config import IMPLEMENTATION, patched_config, takes_grouped_products
from .moments import MomentsFolder, moments_of_another
from .sized import width_of_size
from .steps import steps_of
from .steps.step import LayerForm, Shapes
from .text import check_own, check_text, text_of

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Plan:
    """A checked run."""

    checkpoint: Checkpoint
    outline: Outline
    recipe: Recipe
    spans: dict[str, TensorSpan]  # of the model's class, by the names of the outline
    shard_size: int
    export_as: str | None = None
    text: CalibrationText | None = None
    counts: tuple[int, ...] | None = None  # routed experts that each MoE layer keeps, once a budget is spent
    like: MomentsFolder | None = None  # of another model of this shape: they stand for the text

    @property
    def family(self) -> Family:
        return self.outline.family

    @property
    def shape(self) -> MoeShape:
        return self.outline.shape

    def span(self, name: str) -> TensorSpan:
        """Of a tensor, by its name in the class."""
        return self.spans[self.outline.file(name)]

    @property
    def run(self) -> dict[str, Any]:
        """What makes this run this run."""
        source = {"source": self.checkpoint.fingerprint(), "files": self.checkpoint.identity.record()}
        return source | self.options

    @property
    def form(self) -> Reexpression | None:
        """Of the result, where that is not the family's own."""
        return None if self.export_as is None else self.family.forms[self.export_as]

    @property
    def device(self) -> str:
        """The kind of device that the arithmetic runs on; another kind gives other roundings."""
        return torch.device(self.recipe.device).type

    @property
    def options(self) -> dict[str, Any]:
        """What makes this run this run, beside the source."""
        text = self.text
        return {
            "recipe": self.recipe.to_dict(),
            "shard_size": self.shard_size,
            "export_as": self.export_as,
            **({"calibration": {"name": text.name, "sha256": text.sha256, "tokens": text.tokens}} if text else {}),
            **({"like": self.like.run} if self.like else {}),
        }

    @property
    def shards(self) -> tuple[Path, ...]:
        """The files that hold a tensor of the model's class."""
        return tuple(sorted({span.file for span in self.spans.values()}))

    @property
    def size(self) -> int:
        """Bytes of the tensors that the model's class has."""
        return sum(span.size for span in self.spans.values())

    @property
    def left_out(self) -> list[str]:
        """Names of the other ones, which the result does not get."""
        return left_out(self.checkpoint, self.spans)

    @property
    def grouped(self) -> Grouped:
        """The merge of a recipe that groups experts."""
        assert isinstance(self.recipe.merge, Grouped)
        return self.recipe.merge

    @property
    def fits(self) -> FitKind:
        """What is fitted."""
        return self.fit.kind if self.recipe.merge.rewrites else "none"

    @property
    def fit(self) -> Fit:
        """How layers are fitted, of a recipe that may."""
        assert isinstance(self.recipe.merge, Smaller)
        return self.recipe.merge.fit

    @property
    def reads_text(self) -> bool:
        return self.recipe.needs_text and self.like is None

    @property
    def tokens(self) -> int:
        """Of the calibration text: those that were read, else those that are asked for; 0 where none is read."""
        asked = self.recipe.calibration.tokens if self.reads_text else None
        return self.text.tokens if self.text else asked or 0

    @property
    def width(self) -> int:
        """Of a routed expert of the result."""
        merge = self.recipe.merge
        return merge.width or self.shape.width if isinstance(merge, Smaller) else self.shape.width

    @property
    def reorders(self) -> bool:
        """Whether experts are carried over with their neurons in another order."""
        return "align" in self.recipe.steps

    @property
    def spends_budget(self) -> bool:
        """Whether layers keep different numbers of experts."""
        return isinstance(self.recipe.merge, Grouped) and self.grouped.budget == "damage"

    @property
    def experts(self) -> int:
        """Routed experts of a layer of the result; the mean where layers differ."""
        return self.grouped.experts if isinstance(self.recipe.merge, Grouped) else self.shape.experts

    @property
    def most_experts(self) -> int:
        """As `experts`, of the layer with most, or what that may become."""
        if not self.spends_budget:
            return self.experts
        return max(self.counts) if self.counts else self.shape.experts

    def experts_of(self, layer: int) -> int:
        """Routed experts that a MoE layer keeps."""
        return self.experts if self.counts is None else self.counts[self.shape.layers.index(layer)]

    def expert_spans(self, layer: int) -> list[TensorSpan]:
        return [self.spans[name] for name in self.outline.experts(layer)]

    @property
    def expert_dtype(self) -> torch.dtype:
        """Of the routed experts, as far as the first layer shows."""
        return self.expert_spans(self.shape.layers[0])[0].dtype

    def layer_bytes(self, layer: int) -> int:
        """Bytes of the routed experts of a layer."""
        return sum(span.size for span in self.expert_spans(layer))

    @property
    def shared_bytes(self) -> int:
        """Bytes of all layers' shared experts, where they are fitted along or padded; else 0."""
        if self.fits != "layer" and not self.padding_bytes:
            return 0
        names = [name for layer in self.shape.layers for name in self.outline.shared(layer).values()]
        return sum(self.span(name).size for name in names) + self.padding_bytes

    @property
    def padding_bytes(self) -> int:
        """Bytes of the neurons of zeros by which shared experts become wider."""
        more = self.outline.padded_width(self.width) - self.shape.shared_width
        names = [self.outline.shared(layer)["up_proj"] for layer in self.shape.layers] if more else []
        return sum(3 * more * self.shape.hidden * self.span(name).dtype.itemsize for name in names)

    @property
    def routed_bytes_out(self) -> int:
        """Bytes of all routed experts of the result."""
        routed = sum(map(self.layer_bytes, self.shape.layers))
        return routed * self.experts * self.width // (self.shape.experts * self.shape.width)

    def added(self, layer: int) -> Shapes:
        """Shapes and dtypes of what a layer has more than before, by kind and part: ``base.gate_proj`` ..."""
        expert, router = self.expert_spans(layer)[0].dtype, self.span(self.outline.router(layer)).dtype
        sparse = self.recipe.merge.stays_sparse(layer, self.shape.layers)
        form = LayerForm(layer, self.shape, self.config(), self.experts, expert, router, sparse)
        return {name: shape for step in steps_of(self.recipe) for name, shape in step.added(form).items()}

    def added_bytes(self, layer: int) -> int:
        """Bytes of `added`."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.added(layer).values())

    @property
    def curvature_parameters(self) -> dict[str, int] | None:
        """Trainable numbers of an expert's curvature, and of all; None where none is trained."""
        merge = self.recipe.merge
        if not isinstance(merge, Soft) or merge.curvature.kind != "kronecker":
            return None
        assert merge.curvature.rank is not None
        each = kronecker_parameters(self.shape.hidden, self.shape.width, merge.curvature.rank)
        merged = [layer for layer in self.shape.layers if not merge.stays_sparse(layer, self.shape.layers)]
        return {"an expert": each, "in all": each * self.shape.experts * len(merged)}

    @property
    def all_added_bytes(self) -> int:
        """Those of all layers."""
        return sum(map(self.added_bytes, self.shape.layers))

    @property
    def untied(self) -> list[Item]:
        """The head, where the source has one tensor for it and the embedding (or the embedding, where that is stored
        as the head), and the result has two."""
        if not self.family.is_to_untie(self.checkpoint.config):
            return []
        head, embedding = self.outline.head, self.outline.embedding
        for name, other in ((head, embedding), (embedding, head)):
            if name not in self.spans and other in self.spans:
                return [Item.of(name, self.spans[other])]
        return []

    @property
    def untied_bytes(self) -> int:
        """Those of `untied`."""
        return sum(item.size for item in self.untied)

    @property
    def bytes_out(self) -> int:
        names = [name for layer in self.shape.layers for name in (self.outline.router(layer), self.outline.bias(layer))]
        routers = sum(self.span(name).size for name in names if name)
        routed = sum(map(self.layer_bytes, self.shape.layers))
        added = self.all_added_bytes + self.untied_bytes + self.padding_bytes
        if self.export_as:
            added += sum(item.size for item in constant_items(self))
        gone = routed - self.routed_bytes_out + routers - routers * self.experts // self.shape.experts
        return self.size - gone + added

    def config(self) -> dict[str, Any]:
        """``config.json`` of the result."""
        # Code of others, a path on the machine where it was saved, and what another width needed.
        foreign = ("auto_map", "_name_or_path", IMPLEMENTATION)
        config = {name: value for name, value in self.checkpoint.config.items() if name not in foreign}
        config = patched_config(config, self.outline, self.recipe, self.counts)
        if self.form:
            config = self.form.config(config)
        if self.width != self.shape.width and not takes_grouped_products(self.width):
            config[IMPLEMENTATION] = "eager"
        code = remote_code(config["model_type"])
        if code.auto_map:
            config["auto_map"] = dict(code.auto_map)
            config["architectures"] = [code.auto_map["AutoModelForCausalLM"].rsplit(".", 1)[1]]
        return config


def make_plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    shard_size: str | int,
    export_as: str | None = None,
    reads_text: bool = True,
    texts: Texts | None = None,
    like: Path | None = None,
) -> Plan:
    """Check a recipe against a checkpoint's configuration and headers, and read its calibration text.

    Args:
        reads_text: False where nothing is to be read but headers.
        texts: in the place of the text that the recipe names.
        like: a folder of the moments of another model of this shape, in the place of any text.

    Raises:
        CalibrationError: no such text, or no tokenizer to read it with.
        UsageError: no size of a shard.
        FamilyError: an unsupported family, or one without the form asked for.
        RecipeError: the recipe does not fit this model.
        CheckpointError: tensors that contradict the configuration.
    """
    family = family_of(checkpoint.config)
    outline = outline_in(checkpoint)
    recipe = check_fit(recipe, outline)
    check_own(recipe, texts)
    if export_as is not None:
        _check_form(export_as, recipe, family, checkpoint)
    spans = per_expert(checkpoint, outline)
    check_block(checkpoint.config, outline)
    plan = Plan(checkpoint, outline, recipe, spans, _bytes(shard_size), export_as)
    if recipe.needs_gradients and plan.size > SMALL_BYTES:
        raise RecipeError(
            "neurons 'gradient' holds the whole model and its gradients in memory: accepted for models up to "
            f"{size_text(SMALL_BYTES)}; found {size_text(plan.size)}"
        )
    if like is not None:
        return replace(plan, like=moments_of_another(like, recipe, outline.shape))
    if not recipe.needs_text:
        return plan
    if not reads_text:
        if checkpoint.commit is None:  # of a model on the Hub only headers are here
            check_text(recipe, checkpoint)
        return plan
    text = text_of(recipe, checkpoint, texts)
    return replace(plan, text=text, recipe=recipe.with_text(text.name))


def _check_form(form: str, recipe: Recipe, family: Family, checkpoint: Checkpoint) -> None:
    """Raises:
    FamilyError, RecipeError: this model, or the recipe's result, cannot be written as another model type.
    """
    if form not in family.forms:
        able = "; ".join(f"{', '.join(one.forms)}, of {name}" for name, one in sorted(FAMILIES.items()) if one.forms)
        raise FamilyError(f"--export-as {form} of a {family.model_type} model; accepted: {able}")
    if not isinstance(recipe.merge, Grouped) or recipe.own_class:
        stated = recipe.to_dict()
        raise RecipeError(
            "--export-as writes a stock checkpoint, with as many experts in every layer: it needs merge 'grouped', "
            f"routing 'linear' and budget 'equal'; found merge={stated['merge']}, "
            f"routing={stated['routing']}, budget={stated['budget']}"
        )
    if recipe.merge.width is not None:
        raise RecipeError(f"--export-as writes experts of the width that they had; found width={recipe.merge.width}")
    if reason := family.forms[form].refuse(checkpoint.config):
        raise FamilyError(f"--export-as {form}: config.json: {reason}")


def of_size(
    checkpoint: Checkpoint,
    recipe: Recipe,
    size: str,
    bytes_of: Callable[[Plan], int] = attrgetter("bytes_out"),
    step: int = 1,
) -> Recipe:
    """A recipe of narrower experts with the width under which the result has at most ``size``, such as ``5GB``.

    Args:
        bytes_of: what is compared with the size.
        step: widths are multiples of it.

    Raises:
        UsageError: no such width, or another merge; and what `make_plan` raises.
    """
    merge, most = recipe.merge, _bytes(size, "--size")
    if not isinstance(merge, Narrow):
        raise UsageError(f"--size chooses the width of merge 'narrow'; found merge={merge.kind}")
    plan = make_plan(checkpoint, recipe, most, reads_text=False)

    def of_width(width: int) -> int:
        return bytes_of(replace(plan, recipe=replace(plan.recipe, merge=replace(merge, keep=None, width=width))))

    if (whole := of_width(plan.shape.width)) <= most:
        raise UsageError(f"--size {size}: the model has {size_text(whole)} as it is")
    width = width_of_size(of_width, plan.shape.width, most, step)
    return replace(recipe, merge=replace(merge, keep=None, width=width))


def _bytes(size: str | int, option: str = "--shard-size") -> int:
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]B|)", size.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise UsageError(f"{option} is {size!r}; accepted: a size such as 5GB or 500MB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def constant_items(plan: Plan) -> list[Item]:
    """The tensors of one number that a re-expression adds, in the dtype of their layer's norm."""
    assert plan.form is not None
    items = []
    for name, constant in plan.form.constants(plan.checkpoint.config).items():
        norm = plan.outline.router_norm(plan.outline.layer_of(name) or 0)
        assert norm is not None
        dtype = plan.span(norm).dtype
        items.append(Item(name, dtype, constant.shape, partial(constant.tensor, dtype)))
    return items
