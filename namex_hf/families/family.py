"""Description of a model family: names, shapes and configuration fields. No mathematics, no files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..errors import FamilyError
from ..merging.gate import Gate

Config = Mapping[str, Any]
MAX_LAYERS, MAX_SIZE = 10_000, 1 << 31
"""Upper bounds of the number of layers, and of every other whole number in a configuration."""
SIZES = (
    "vocab_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
"""Whole numbers from 1 for which a class has a default."""
LAYER_EXPERTS = "layer_experts"
"""Field of a patched model's configuration: the number of experts of each layer, where layers differ."""


@dataclass(frozen=True)
class MoeShape:
    """The sizes of a mixture-of-experts model."""

    layers: tuple[int, ...]  # indices of the MoE layers
    experts: int  # per layer; the largest number where layers differ
    gate: Gate
    hidden: int
    width: int  # of one routed expert
    shared_width: int  # 0: there is no shared expert
    counts: tuple[int, ...] | None = None  # experts per MoE layer; None: `experts` in every layer

    @property
    def top_k(self) -> int:
        return self.gate.top_k

    @property
    def renormalises(self) -> bool:
        return self.gate.renormalises

    def experts_of(self, layer: int) -> int:
        """Number of experts of a MoE layer."""
        return self.experts if self.counts is None else self.counts[self.layers.index(layer)]

    def of(self, projection: str) -> tuple[int, int]:
        """Shape of one routed expert's matrix."""
        return (self.hidden, self.width) if projection == "down_proj" else (self.width, self.hidden)


PREDICTION = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
"""Fields that count layers which predict further tokens."""


def context_of(config: Config) -> int | None:
    """Largest number of tokens in a sequence, if the configuration states it. Args: config, raw."""
    longest = config.get("max_position_embeddings")
    return longest if isinstance(longest, int) else None


def without_prediction(config: Config) -> dict[str, Any]:
    """Fields that say that no layers predict further tokens: those layers are in no class, and are left out."""
    return dict.fromkeys((name for name in PREDICTION if config.get(name)), 0)


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
    """One ``model_type``: what cannot be read off its class in transformers. See `docs/families.md`.

    Names of tensors and modules are those of the class, below the MoE block or the decoder layer.
    """

    model_type: str
    gate: Callable[[Any], Gate]
    """From the configuration, as an object of its class."""
    experts_field: str = "num_experts"
    top_k_field: str = "num_experts_per_tok"
    width_field: str = "moe_intermediate_size"
    router: str = "gate.weight"
    bias: str | None = None
    """The router's correction bias, a tensor of as many numbers as there are experts."""
    shared_name: str | None = None
    shared_gate_name: str | None = None  # of a sigmoid gate before the shared expert
    norm: str | None = "post_attention_layernorm.weight"
    """Weight of the norm whose output the router reads, below the decoder layer; None: there is none."""
    norm_offset: float = 0.0  # the norm multiplies by this plus its weight
    linear: bool = True
    """Whether the decoder layer's output is the routed experts' output plus what does not depend on it."""
    shared_count: str | None = None
    """Field of the number of shared experts, where their width is that number times the routed experts' width."""
    narrows: bool = True
    """Whether the width of routed experts can change alone."""
    least: int = 1
    """Number of experts that a router needs."""
    needs: tuple[str, ...] = ()
    optional: Mapping[str, int] = field(default_factory=dict)  # may be absent; each with its least value
    refuse: Callable[[Config], str | None] = field(default=lambda config: None)
    fewer: Callable[[Config], dict[str, Any]] = field(default=lambda config: {})
    """Fields that a model with fewer experts has in the place of this one's, beside the numbers of experts."""
    patched_type: str | None = None
    """``model_type`` of the class with a base expert or another router; None: there is no such class."""
    forms: Mapping[str, Reexpression] = field(default_factory=dict)
    """Other model types as which a grouped model can be written, exactly."""
    unties: bool = False
    """Whether results store embedding and head apart: other programs for this family cannot read tied models."""

    def check(self, config: Config) -> None:
        """Check the numbers of a raw ``config.json``, before a class is built of them.

        Raises:
            FamilyError: a field is missing or is not a whole number in its range, or the model is not supported.
        """
        required = ("num_hidden_layers", "hidden_size", self.width_field, self.top_k_field, self.experts_field)
        stated = (name for name in SIZES if config.get(name) is not None)
        least = dict.fromkeys((*required, *self.needs, *stated), 1)
        least |= {name: low for name, low in self.optional.items() if name in config}
        for name, lowest in least.items():
            value, most = self.number(config, name), MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE
            if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= most:
                raise FamilyError(
                    f"config.json: '{name}' is {value!r}; {self.model_type} needs a whole number from {lowest} "
                    f"to {most}"
                )
        if reason := self.refuse(config):
            raise FamilyError(f"config.json: {reason}")
        experts, top_k = self.number(config, self.experts_field), self.number(config, self.top_k_field)
        if top_k > experts:
            raise FamilyError(f"config.json: '{self.top_k_field}' is {top_k}, above '{self.experts_field}' = {experts}")
        counts = config.get(LAYER_EXPERTS)
        if counts is not None and not (
            isinstance(counts, list)
            and len(counts) == config["num_hidden_layers"]
            and all(type(count) is int and 0 <= count <= experts for count in counts)
        ):
            raise FamilyError(
                f"config.json: '{LAYER_EXPERTS}' is {counts!r}; accepted: a number for each of "
                f"{config['num_hidden_layers']} layers, of MoE layers from 1 to '{self.experts_field}' = {experts}"
            )

    def names(self, name: str) -> tuple[str, ...]:
        """A field and all other names that transformers reads it by."""
        from transformers import CONFIG_MAPPING

        from .. import models  # noqa: F401  (registers the classes of this package)

        aliases: Mapping[str, str] = CONFIG_MAPPING[self.model_type].attribute_map
        named = {aliases.get(name, name), *(other for other, own in aliases.items() if own == aliases.get(name, name))}
        return (name, *sorted(named - {name}))

    def number(self, config: Config, name: str) -> Any:
        """The value of a field under any of its names; of a list with equal entries, one a layer, the entry."""
        value = next((config[one] for one in self.names(name) if one in config), None)
        equal = (
            isinstance(value, list) and len(value) == config.get("num_hidden_layers") and len({*map(repr, value)}) == 1
        )
        return value[0] if equal and isinstance(value, list) else value

    def with_experts(self, config: Config, experts: int) -> dict[str, Any]:
        """The fields of a configuration that say that there are fewer experts, under all names that they have."""
        result = self.fewer(config)
        top_k = min(experts, self.number(config, self.top_k_field))
        for field_name, value in ((self.experts_field, experts), (self.top_k_field, top_k)):
            for name in self.names(field_name):
                if name in config:
                    result[name] = [value] * len(config[name]) if isinstance(config[name], list) else value
        return result

    def with_width(self, config: Config, width: int, shared_width: int) -> dict[str, Any]:
        """The fields of a configuration that say that routed experts are narrower.

        Args:
            shared_width: of the shared expert, a multiple of ``width`` where the family counts it so.
        """
        values = {self.width_field: width}
        if self.shared_count is not None:
            values[self.shared_count] = shared_width // width
        return {
            name: value for field_name, value in values.items() for name in self.names(field_name) if name in config
        }

    def is_to_untie(self, config: Config) -> bool:
        """Whether this model ties its head to the embedding, and its result must store them apart."""
        return self.unties and bool(config.get("tie_word_embeddings", False))
