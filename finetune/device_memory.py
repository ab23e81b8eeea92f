"""What fine-tuning a patched model takes of a device's memory, from its configuration alone.

Exact, and checked against the tensors of a real step: numbers by kind, and the bytes of weights, gradients and
optimiser state on the device that holds most. Estimates, of what is alive at once: layers gathered whole, activations,
the head's loss as TRL computes it. Not counted: the device's context, fragmentation, buffers of communication,
temporaries of the optimiser; `MARGIN` is for them.

Every number trained costs 16 bytes under AdamW with float32 moments, whether the weights are float32 (``mixed``) or
bfloat16 with a float32 copy (``master``): Rajbhandari et al. 2020, "ZeRO", section 3.1.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2MoeConfig

from namex_hf.errors import TrainingError
from namex_hf.evaluation.table import Table
from namex_hf.families import original_family
from namex_hf.families.kinds import KINDS, kind_of
from namex_hf.families.outline import outline_of
from namex_hf.merging.momentum import parts as momentum_parts
from namex_hf.models import DeepseekConfig
from namex_hf.models.configuration_namex import SoftChoice, is_residual, soft_choice
from namex_hf.patching.check import check_fit
from namex_hf.patching.config import patched_config
from namex_hf.recipe import Recipe
from namex_hf.training.choice import WHOLE, check_kinds
from namex_hf.training.live import check_first_base

STRATEGIES = ("one", "fsdp2", "zero3", "lora")
SHARDED = ("fsdp2", "zero3")
PROPAGATIONS = ("stored", "live")
DEVICES = (24, 40, 80, 141)
"""Sizes of devices, in GB."""
MARGIN = 0.1
"""Part of a device that is kept free for what is not counted."""
TILE = (4096, 32768)
"""Tokens and vocabulary of the tiles in which TRL computes logits, never all of them."""
COMPUTE = 2
"""Bytes of a number in forward and backward: bfloat16."""


class Precision(NamedTuple):
    """Bytes of a number that trains."""

    weight: int
    copy: int
    """Of a second, float32 copy that the optimiser keeps."""
    gradient: int
    moments: int
    """Both of AdamW's together."""


PRECISIONS = {
    "mixed": Precision(4, 0, 4, 8),
    "master": Precision(2, 4, 2, 8),
    "bfloat16": Precision(2, 0, 2, 4),
    "8bit": Precision(2, 0, 2, 2),
}
"""``mixed``: float32, computed in bfloat16, what a `Trainer` with ``bf16`` and accelerate's FSDP2 do; ``master``:
DeepSpeed with ``bf16``; ``bfloat16``: weights and torch's AdamW in bfloat16; ``8bit``: the same with moments of 8 bits
(their scales add 2 %)."""
USUAL = {"one": "mixed", "fsdp2": "mixed", "zero3": "master", "lora": "bfloat16"}
"""The precision of each strategy where none is named; under ``lora`` that of what is frozen or trained as a whole."""
ADAPTER = PRECISIONS["mixed"]
"""PEFT keeps low-rank factors in float32, also over frozen weights in bfloat16."""


@dataclass(frozen=True)
class Plan:
    """How a model is to be trained."""

    strategy: str = "fsdp2"
    """One of `STRATEGIES`."""
    devices: int = 8
    tokens: int = 4096
    """In a device's forward pass."""
    length: int = 2048
    """Of a sequence, in tokens."""
    checkpointing: bool = True
    """Whether a layer's activations are computed again in the backward pass."""
    precision: str | None = None
    """One of `PRECISIONS`; None: what is usual for the strategy."""
    kinds: tuple[str, ...] = ("experts", "router", "attention")
    """Under ``lora``: what the adapter is on; base expert and curvature it trains as a whole."""
    rank: int = 16
    """Of the adapter."""
    propagation: str = "stored"
    """One of `PROPAGATIONS`: a base expert of each layer's own, or one that walks in the forward pass."""

    def __post_init__(self) -> None:
        """Raises:
        TrainingError: a field is out of range, or two contradict each other.
        """
        if self.strategy not in STRATEGIES:
            raise TrainingError(f"strategy is {self.strategy!r}; accepted: {', '.join(STRATEGIES)}")
        if self.propagation not in PROPAGATIONS:
            raise TrainingError(f"propagation is {self.propagation!r}; accepted: {', '.join(PROPAGATIONS)}")
        if self.precision is not None and self.precision not in PRECISIONS:
            raise TrainingError(f"precision is {self.precision!r}; accepted: {', '.join(PRECISIONS)}")
        for name in ("devices", "tokens", "length", "rank"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} is {getattr(self, name)}; accepted: a whole number from 1")
        if self.devices > 1 and self.strategy not in SHARDED:
            raise TrainingError(
                f"devices is {self.devices} and strategy '{self.strategy}' is for one; accepted with more: "
                f"{', '.join(SHARDED)}"
            )
        if self.tokens % self.length:
            raise TrainingError(f"tokens is {self.tokens}; accepted: a multiple of length, {self.length}")
        if self.strategy == "lora":
            check_kinds(self.kinds, adapter=True)

    @property
    def bytes(self) -> Precision:
        return PRECISIONS[self.precision or USUAL[self.strategy]]


class Part(NamedTuple):
    """A parameter."""

    name: str
    kind: str
    shape: tuple[int, ...]
    layer: int | None
    """None: outside the decoder layers."""

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Outline:
    """A patched model without its numbers."""

    config: Any
    parts: tuple[Part, ...]
    frozen: int
    """Numbers of saved buffers, of the weights' type and whole on every device."""
    buffers: int
    """Bytes of other buffers, whole on every device."""

    @property
    def counts(self) -> dict[str, int]:
        """Numbers by kind; only kinds that the model has."""
        found = dict.fromkeys(KINDS, 0)
        for part in self.parts:
            found[part.kind] += part.size
        return {kind: number for kind, number in found.items() if number}

    def learnt(self, plan: Plan) -> tuple[Part, ...]:
        """Parameters that get gradients where all train: of a live base expert the first layer's alone."""
        if plan.propagation == "stored":
            return self.parts
        first = self.base_layers()[0]
        return tuple(part for part in self.parts if part.kind != "base" or part.layer == first)

    def base_layers(self) -> list[int]:
        """Decoder layers that have a base expert, in order."""
        return sorted({part.layer for part in self.parts if part.kind == "base" and part.layer is not None})

    def largest_layer(self) -> int:
        """Numbers of the decoder layer that has most."""
        layers: dict[int, int] = {}
        for part in self.parts:
            if part.layer is not None:
                layers[part.layer] = layers.get(part.layer, 0) + part.size
        return max(layers.values())

    def head(self) -> int:
        """Numbers of the language model's head, which a sharded model gathers like a layer; tied embeddings are it."""
        heads = [part.size for part in self.parts if part.name.startswith("lm_head.")]
        return sum(heads) or next(part.size for part in self.parts if "embed_tokens" in part.name)


@dataclass(frozen=True)
class Memory:
    """Bytes on the device that holds most."""

    trained: int
    """Numbers that train, on all devices together."""
    weights: int
    gradients: int
    optimiser: int
    """Moments, and a float32 copy of the weights where one is kept."""
    gathered: int
    """Estimate: two layers whole (the next is fetched while one computes), one layer's gradients, the head and its."""
    activations: int
    """Estimate: what autograd keeps of decoder layers."""
    logits: int
    """Estimate: what the head's loss takes."""

    @property
    def exact(self) -> int:
        return self.weights + self.gradients + self.optimiser

    @property
    def total(self) -> int:
        return self.exact + self.gathered + self.activations + self.logits

    def fits(self, gigabytes: float) -> bool:
        """Whether it fits a device of that size with `MARGIN` to spare."""
        return self.total <= gigabytes * 1e9 * (1 - MARGIN)


PUBLISHED = {
    "qwen1.5-moe-a2.7b": Qwen2MoeConfig(
        max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    ),
    "deepseek-moe-16b": DeepseekConfig(first_k_dense_replace=1),
}
"""Shapes of published checkpoints, known without the Hub: Qwen1.5-MoE-A2.7B, DeepSeek-MoE-16B."""


def outline(config: Mapping[str, Any], recipe: Recipe | None = None) -> Outline:
    """The parameters of a patched model, built on the meta device.

    Args:
        config: a raw ``config.json``, of a stock model or of one that is patched.
        recipe: for a stock model; None: the default. A patched one has its own.

    Raises:
        FamilyError: of no supported family.
        RecipeError: the recipe does not fit.
        TrainingError: a recipe for what is patched already.
    """
    raw = dict(config)
    if isinstance(raw.get("namex"), dict):
        if recipe is not None:
            raise TrainingError("the model is patched already, so a recipe says nothing; accepted: none")
        original_family(raw)
    else:
        outline, recipe = outline_of(raw), recipe or Recipe()
        recipe = check_fit(recipe, outline)
        raw = patched_config(raw, outline, recipe)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw))
    parts = tuple(Part(name, kind_of(name), tuple(p.shape), _layer(name)) for name, p in model.named_parameters())
    saved, frozen, buffers = model.state_dict().keys(), 0, 0
    for name, buffer in model.named_buffers():
        if name in saved and buffer.is_floating_point():
            frozen += buffer.numel()
        else:
            buffers += buffer.nbytes
    return Outline(model.config, parts, frozen, buffers)


def _layer(name: str) -> int | None:
    words = name.split(".")
    return int(words[words.index("layers") + 1]) if "layers" in words else None


def local(shape: Sequence[int], plan: Plan) -> int:
    """Numbers of a parameter that the first device holds; none holds more.

    FSDP2 deals out the rows; ZeRO-3 the numbers, row after row.
    """
    if plan.strategy == "fsdp2":
        return ceil(shape[0] / plan.devices) * prod(shape[1:])
    return ceil(prod(shape) / plan.devices)


def memory(model: Outline, plan: Plan) -> Memory:
    """What a step of training costs a device.

    Raises:
        TrainingError: an adapter on kinds that the model does not have, or a live base in one in which none walks.
    """
    if plan.propagation == "live" and not Recipe.from_stored(model.config.namex).merge.propagates:
        raise TrainingError("propagation is 'live', and no base expert of this model walks; accepted: stored")
    if plan.propagation == "live":
        check_first_base(Recipe.from_stored(model.config.namex))
    activations, logits = _activations(model, plan), _logits(model, plan)
    if plan.strategy == "lora":
        return _adapted(model, plan, activations, logits)
    here = sum(local(part.shape, plan) for part in model.parts)
    learnt = sum(local(part.shape, plan) for part in model.learnt(plan))
    each = plan.bytes
    gathered = 0
    if plan.strategy in SHARDED:
        gathered = COMPUTE * (3 * model.largest_layer() + 2 * model.head())
    return Memory(
        trained=sum(part.size for part in model.learnt(plan)),
        weights=(here + model.frozen) * each.weight + model.buffers,
        gradients=learnt * each.gradient,
        optimiser=learnt * (each.copy + each.moments),
        gathered=gathered,
        activations=activations,
        logits=logits,
    )


def _adapted(model: Outline, plan: Plan, activations: int, logits: int) -> Memory:
    for kind in plan.kinds:
        if kind not in model.counts:
            raise TrainingError(
                f"an adapter on '{kind}', which the model does not have; it has {', '.join(model.counts)}"
            )
    each, chosen = plan.bytes, [part for part in model.learnt(plan) if part.kind in plan.kinds]
    whole = sum(part.size for part in chosen if part.kind in WHOLE)
    factors = sum(factor_numbers(part, plan.rank) for part in chosen)
    every = sum(part.size for part in model.parts)
    copied = sum(part.size for part in model.parts if part.kind in plan.kinds and part.kind in WHOLE)
    return Memory(
        trained=whole + factors,
        weights=each.weight * (every + model.frozen + copied) + ADAPTER.weight * factors + model.buffers,
        gradients=each.gradient * whole + ADAPTER.gradient * factors,
        optimiser=(each.copy + each.moments) * whole + ADAPTER.moments * factors,
        gathered=0,
        activations=activations,
        logits=logits,
    )


def factor_numbers(part: Part, rank: int) -> int:
    """Numbers of a low-rank adapter on a matrix ``[out, in]``, or on each of stacked ones ``[experts, out, in]``."""
    if part.kind in WHOLE or len(part.shape) < 2 or part.name.endswith("shared_expert_gate.weight"):
        return 0
    *stacked, rows, columns = part.shape
    return prod(stacked) * rank * (rows + columns)


def _logits(model: Outline, plan: Plan) -> int:
    """Of TRL's fused head: a tile of logits, gradients in float32 of its inputs and, if it trains, of the head."""
    tile = min(plan.tokens, TILE[0]) * min(model.config.vocab_size, TILE[1])
    trains = plan.strategy != "lora"
    return COMPUTE * tile + 4 * (plan.tokens * model.config.hidden_size + trains * model.head())


def _activations(model: Outline, plan: Plan) -> int:
    """Estimate: of all layers, or with checkpointing the input of each and all of one."""
    layers = model.config.num_hidden_layers
    experts = sum(part.size for part in model.parts if part.kind == "experts" and part.layer == layers - 1)
    of_one = layer_activations(model.config, plan.tokens, plan.length)
    if plan.strategy == "lora" and "experts" in plan.kinds:
        of_one += COMPUTE * experts  # the experts with the adapter in them
    walking = _walking(model, plan) if plan.propagation == "live" else 0
    if not plan.checkpointing:
        return layers * of_one + walking
    return layers * COMPUTE * plan.tokens * model.config.hidden_size + of_one + walking


def _walking(model: Outline, plan: Plan) -> int:
    """Estimate: a base expert for each layer that it walks to, under checkpointing in float32 and with its momentum;
    and in the backward pass one matrix of all of a layer's experts."""
    layers, matrices = model.base_layers(), [part for part in model.parts if part.kind == "experts"]
    base = sum(part.size for part in model.parts if part.kind == "base" and part.layer == layers[0])
    merge = check_first_base(Recipe.from_stored(model.config.namex))
    buffers = len(momentum_parts(merge.propagation.complex_beta))
    kept = 4 * base * (1 + buffers) if plan.checkpointing else COMPUTE * base
    largest = max(part.size // 2 if "gate_up" in part.name else part.size for part in matrices)
    return (len(layers) - 1) * kept + plan.bytes.weight * largest


def layer_activations(config: Any, tokens: int, length: int) -> int:
    """Estimate of the bytes that autograd keeps of one MoE layer: inputs of products, of norms and of activations.

    Attention keeps its inputs and output but not its weights (flash or memory-efficient kernels).
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    attention = 2 * heads * head + 2 * config.num_key_value_heads * head
    shared = 4 * config.shared_expert_intermediate_size + hidden
    norms_and_softmax = 2 * 4 * hidden + 4 * heads + 8 * config.num_experts
    a_token = COMPUTE * (attention + shared + 4 * hidden) + norms_and_softmax
    return tokens * a_token + _routed_activations(config, tokens, length)


def _routed_activations(config: Any, tokens: int, length: int) -> int:
    hidden, width, choice = config.hidden_size, config.moe_intermediate_size, soft_choice(config.namex)
    expert = 3 * hidden * width
    if choice is None:
        base = (4 * width + hidden) * is_residual(config.namex)
        return COMPUTE * tokens * (config.num_experts_per_tok * (4 * width + 2 * hidden) + base)
    if choice.segment is None:
        groups, numbers = 0, tokens * _of_a_token(config, choice)
    else:
        groups = tokens // length * ceil(length / choice.segment)
        numbers = tokens * (4 * width + 2 * hidden) + groups * expert
    if choice.curvature == "kronecker":
        assert choice.rank is not None
        numbers += (4 * choice.rank + 2) * config.num_experts * expert
    elif choice.curvature == "calibrated":
        assert choice.rank is not None
        directions = config.num_experts * choice.rank
        numbers += groups * (2 * expert + 6 * directions * (2 * width + hidden))
    return COMPUTE * numbers


def _of_a_token(config: Any, choice: SoftChoice) -> int:
    """Numbers of a token's own merged expert: what goes into both products and comes out of them, for every pair."""
    hidden, width = config.hidden_size, config.moe_intermediate_size
    if not choice.has_base and choice.top_k is None:  # expert by expert, each computed again
        return 5 * width + hidden + 2 * config.num_experts
    pairs = choice.top_k or config.num_experts_per_tok
    base = 2 * width + hidden
    return pairs * (2 * hidden + 3 * width) + base * choice.has_base + 5 * width + hidden


def counts_table(models: Mapping[str, Outline]) -> Table:
    """Numbers by kind."""
    counts = [model.counts for model in models.values()]
    kinds = [kind for kind in KINDS if any(kind in count for count in counts)]
    rows = [[kind, *(f"{count.get(kind, 0):,}" for count in counts)] for kind in kinds]
    return Table(["", *models], [*rows, ["together", *(f"{sum(count.values()):,}" for count in counts)]])


def memory_table(plans: Iterable[tuple[Plan, Memory]]) -> Table:
    """GB a device by strategy, and which devices that fits."""
    columns = list(plans)
    several = [f" x {plan.devices}" if plan.strategy in SHARDED else "" for plan, _ in columns]
    rows = [
        ["precision", *(plan.precision or USUAL[plan.strategy] for plan, _ in columns)],
        ["numbers trained", *(f"{found.trained / 1e9:.3f} G" for _, found in columns)],
    ]
    for name in ("weights", "gradients", "optimiser", "gathered", "activations", "logits", "total"):
        rows.append([name, *(f"{getattr(found, name) / 1e9:.1f}" for _, found in columns)])
    fitting = [[str(size) for size in DEVICES if found.fits(size)] for _, found in columns]
    rows.append(["fits", *(", ".join(sizes) or "none" for sizes in fitting)])
    return Table(["", *(plan.strategy + more for (plan, _), more in zip(columns, several, strict=True))], rows)
