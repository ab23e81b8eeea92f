"""Description of a model family: names, shapes and configuration fields. No mathematics, no files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..errors import FamilyError
from ..merging.experts import PROJECTIONS

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Config = Mapping[str, Any]
MAX_LAYERS, MAX_SIZE = 10_000, 1 << 31
"""Upper bounds of the number of layers, and of every other whole number in a configuration."""
SIZES = {
    "vocab_size": 1,
    "intermediate_size": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 1,
    "max_position_embeddings": 1,
}
"""Whole numbers for which a class has a default, each with its least value."""
LAYER_EXPERTS = "layer_experts"
"""Field of a patched model's configuration: the number of experts of each layer, where layers differ."""


@dataclass(frozen=True)
class MoeShape:
    """The sizes of a mixture-of-experts model, from its configuration."""

    layers: tuple[int, ...]  # indices of the MoE layers
    experts: int  # per layer; the largest number where layers differ
    top_k: int
    hidden: int
    width: int  # of one routed expert
    shared_width: int
    renormalises: bool  # top-k values rescaled to sum 1
    counts: tuple[int, ...] | None = None  # experts per MoE layer; None: `experts` in every layer

    def experts_of(self, layer: int) -> int:
        """Number of experts of a MoE layer."""
        return self.experts if self.counts is None else self.counts[self.layers.index(layer)]

    def of(self, projection: str) -> tuple[int, int]:
        """Shape of one routed expert's matrix."""
        return (self.hidden, self.width) if projection == "down_proj" else (self.width, self.hidden)

    def of_shared(self, projection: str) -> tuple[int, int]:
        """Shape of the shared expert's matrix."""
        return (self.hidden, self.shared_width) if projection == "down_proj" else (self.shared_width, self.hidden)


class Constant(NamedTuple):
    """A tensor whose entries are all equal."""

    shape: tuple[int, ...]
    value: float = 0.0
    value_in_float16: float = 0.0

    def tensor(self, dtype: torch.dtype) -> torch.Tensor:
        value = self.value_in_float16 if dtype == torch.float16 else self.value
        return torch.full(self.shape, value, dtype=dtype)


@dataclass(frozen=True)
class Reexpression:
    """How a model is written, exactly, under another family's names."""

    config: Callable[[Config], dict[str, Any]]
    rename: Callable[[str], str]
    doubled: Callable[[str], bool]  # whether the tensor of this old name is written times two
    constants: Callable[[Config], dict[str, Constant]]  # tensors to add
    refuse: Callable[[Config], str | None]  # the reason why this configuration cannot be written so, or None


@dataclass(frozen=True)
class Family:
    """One ``model_type``. Adding a family is one file beside this one that defines ``FAMILY``.

    The name of a tensor alone gives its layer, expert and projection. The fused layout of transformers 5
    (``mlp.experts.gate_up_proj``) is the same for all families that use its fused experts.
    """

    model_type: str
    patched_type: str
    experts_field: str
    shared_name: str
    moe_layers: Callable[[Config], tuple[int, ...]]
    shared_width: Callable[[Config], int]
    needs: tuple[str, ...]
    optional: Mapping[str, int]  # whole numbers that may be absent, each with its least value
    refuse: Callable[[Config], str | None] = field(default=lambda config: None)
    renormalises: Callable[[Config], bool] = field(default=lambda config: bool(config.get("norm_topk_prob", False)))
    shared_gate_name: str | None = None  # of a sigmoid gate before the shared expert
    as_qwen2_moe: Reexpression | None = None
    unties: bool = False
    """Whether results store embedding and head apart: other programs for this family cannot read tied models."""

    def shape(self, config: Config) -> MoeShape:
        """Read the sizes from a raw ``config.json``.

        Raises:
            FamilyError: a field is missing or is not a whole number in its range, or the model is not supported.
        """
        required = ("num_hidden_layers", "hidden_size", "moe_intermediate_size", "num_experts_per_tok")
        least = dict.fromkeys((*required, self.experts_field, *self.needs), 1)
        stated = {name: low for name, low in SIZES.items() if config.get(name) is not None}
        stated |= {name: low for name, low in self.optional.items() if name in config}
        for name, lowest in (least | stated).items():
            value, most = config.get(name), MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE
            if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= most:
                raise FamilyError(
                    f"config.json: '{name}' is {value!r}; {self.model_type} needs a whole number from {lowest} "
                    f"to {most}"
                )
        if reason := self.refuse(config):
            raise FamilyError(f"config.json: {reason}")
        experts, top_k = config[self.experts_field], config["num_experts_per_tok"]
        if top_k > experts:
            raise FamilyError(
                f"config.json: 'num_experts_per_tok' is {top_k}, above '{self.experts_field}' = {experts}"
            )
        layers = self.moe_layers(config)
        if not layers:
            raise FamilyError("config.json: no layer is a mixture of experts; at least one is needed")
        counts = config.get(LAYER_EXPERTS)
        if counts is not None and not (
            isinstance(counts, list)
            and len(counts) == config["num_hidden_layers"]
            and all(type(counts[layer]) is int and 1 <= counts[layer] <= experts for layer in layers)
        ):
            raise FamilyError(
                f"config.json: '{LAYER_EXPERTS}' is {counts!r}; accepted: a number for each of "
                f"{config['num_hidden_layers']} layers, of MoE layers from 1 to '{self.experts_field}' = {experts}"
            )
        return MoeShape(
            layers=layers,
            experts=experts,
            top_k=top_k,
            hidden=config["hidden_size"],
            width=config["moe_intermediate_size"],
            shared_width=self.shared_width(config),
            renormalises=self.renormalises(config),
            counts=None if counts is None else tuple(counts[layer] for layer in layers),
        )

    def is_to_untie(self, config: Config) -> bool:
        """Whether this model ties its head to the embedding, and its result must store them apart."""
        return self.unties and bool(config.get("tie_word_embeddings", False))

    def block(self, layer: int) -> str:
        return f"model.layers.{layer}.mlp"

    def expert(self, layer: int, expert: int, projection: str) -> str:
        return f"{self.block(layer)}.experts.{expert}.{projection}.weight"

    def experts(self, layer: int, count: int) -> dict[str, tuple[int, str]]:
        """Expert and projection of every tensor of a layer's routed experts, by the tensor's name."""
        return {self.expert(layer, e, name): (e, name) for e in range(count) for name in PROJECTIONS}

    def all_experts(self, shape: MoeShape) -> dict[str, tuple[int, int, str]]:
        """Layer, expert and projection of every tensor of all routed experts, by the tensor's name."""
        layers = {layer: self.experts(layer, shape.experts_of(layer)) for layer in shape.layers}
        return {name: (layer, *place) for layer, places in layers.items() for name, place in places.items()}

    def fused(self, layer: int, name: str) -> str:
        """Name of a fused tensor, ``gate_up_proj [N, 2 width, hidden]`` or ``down_proj [N, hidden, width]``."""
        return f"{self.block(layer)}.experts.{name}"

    def router(self, layer: int) -> str:
        return f"{self.block(layer)}.gate.weight"

    def router_norm(self, layer: int) -> str:
        """Weight of the norm whose output the router reads."""
        return f"model.layers.{layer}.post_attention_layernorm.weight"

    def shared(self, layer: int, projection: str) -> str:
        return f"{self.block(layer)}.{self.shared_name}.{projection}.weight"

    def shared_parts(self, layer: int) -> dict[str, str]:
        """Names of all tensors of the shared expert: by projection, and ``gate`` where it has a gate."""
        parts = {projection: self.shared(layer, projection) for projection in PROJECTIONS}
        if self.shared_gate_name is not None:
            parts["gate"] = f"{self.block(layer)}.{self.shared_gate_name}.weight"
        return parts

    def added(self, layer: int, kind: str, part: str) -> str:
        """Name of a tensor that only the patched model has: of the ``base`` expert, or of another `kind` of part."""
        return f"{self.block(layer)}." + (f"base_expert.{part}.weight" if kind == "base" else f"{kind}.{part}")
