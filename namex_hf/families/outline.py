"""What is known of a model before a tensor is read: its class, built on the meta device, and its family's facts."""

import json
import re
from collections.abc import Container, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings, revert_weight_conversion
from transformers.utils import logging

from ..errors import CheckpointError, FamilyError
from ..merging.experts import PROJECTIONS
from ..merging.routing import Activation
from . import original_family
from .family import LAYER_EXPERTS, Config, Family, MoeShape

FOREIGN = ("auto_map", "_name_or_path")
"""Fields of ``config.json`` without influence on a known class."""
COUNTS = re.compile(r"(^|_)(n|num)_(\w+_)?(layers?|experts|blocks)$")
"""Names of fields that count the modules of a class."""
LEAST = 1000
"""Number of modules accepted for any class, however few tensors its files hold: modules can share tensors."""
MOST_EXPERTS = 1 << 18
"""Routed experts of all layers together; every one of them gets three names."""
FUSED = ("gate_up_proj", "down_proj")
"""The stacked matrices of a layer's experts in a class: ``[N, 2 width, hidden]`` and ``[N, hidden, width]``."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Outline:
    """A model without its numbers. Names of files are those that `save_pretrained` writes, every expert apart."""

    family: Family
    shape: MoeShape
    tensors: Mapping[str, TensorSpec]  # of the class, by their names in files
    tied: Mapping[str, str]
    """Tied tensors of the class, both ways, by name: files need to hold only one of the two."""
    files: Mapping[str, str]  # names in files by names in the class, but for those of routed experts
    decoder_layers: tuple[str, ...]  # paths in the class
    blocks: Mapping[int, str]  # paths of the MoE blocks by layer
    expert_names: Mapping[tuple[int, int, str], str]  # names in files by layer, expert and projection
    activation: Activation  # of the experts
    embedding: str  # names in the class
    head: str
    renamings: tuple[WeightRenaming, ...]  # from older names in files to those in the class

    def file(self, name: str) -> str:
        """The name in files of a tensor of the class, or of one that only a patched class has."""
        return self.files.get(name, name)

    def stored(self, name: str, names: Container[str]) -> str:
        """Under which of the names of files a tensor of the class is stored: its own, or that of one it is tied to."""
        file = self.file(name)
        return file if file in names else self.tied.get(file, file)

    def in_class(self, name: str) -> str:
        """What transformers makes of a name in files, but for joining experts."""
        return apply_renamings(name, list(self.renamings))

    @cached_property
    def by_class_name(self) -> Mapping[str, str]:
        """The names in files of `tensors` by what transformers makes of them."""
        return {self.in_class(name): name for name in self.tensors}

    def experts(self, layer: int, count: int | None = None) -> dict[str, tuple[int, str]]:
        """Expert and projection of every tensor of a layer's experts, or of the first of them, by name in files."""
        most = self.shape.experts_of(layer) if count is None else count
        return {self.expert(layer, e, name): (e, name) for e in range(most) for name in PROJECTIONS}

    def expert(self, layer: int, expert: int, projection: str) -> str:
        """The name of an expert's matrix in files."""
        return self.expert_names[layer, expert, projection]

    @cached_property
    def places(self) -> Mapping[str, tuple[int, int, str]]:
        """Layer, expert and projection of every tensor of all routed experts, by name in files."""
        return {name: place for place, name in self.expert_names.items()}

    def fused(self, layer: int, name: str) -> str:
        """Name in the class of one of the `FUSED` tensors."""
        return f"{self.blocks[layer]}.experts.{name}"

    def router(self, layer: int) -> str:
        """Name in the class."""
        return f"{self.blocks[layer]}.{self.family.router}"

    def bias(self, layer: int) -> str | None:
        """Name in the class of the router's correction bias; None where this model has none."""
        name = f"{self.blocks[layer]}.{self.family.bias}"
        return name if name in self.files else None

    def router_norm(self, layer: int) -> str | None:
        """Name in the class of the weight of the norm whose output the router reads."""
        return None if self.family.norm is None else f"{self.decoder_layers[layer]}.{self.family.norm}"

    def shared(self, layer: int) -> dict[str, str]:
        """Names in the class of the shared expert's tensors: by projection, and ``gate`` where it has a gate."""
        if not self.shape.shared_width:
            return {}
        block, family = self.blocks[layer], self.family
        parts = {projection: f"{block}.{family.shared_name}.{projection}.weight" for projection in PROJECTIONS}
        if family.shared_gate_name is not None:
            parts["gate"] = f"{block}.{family.shared_gate_name}.weight"
        return parts

    def padded_width(self, width: int) -> int:
        """Width of the shared expert beside routed experts of another width: the next that the family can state."""
        shared = self.shape.shared_width
        return -(-shared // width) * width if self.family.shared_count is not None else shared

    def added(self, layer: int, kind: str, part: str) -> str:
        """Name of a tensor that only the patched model has: of the ``base`` expert, or of another `kind` of part."""
        return f"{self.blocks[layer]}." + (f"base_expert.{part}.weight" if kind == "base" else f"{kind}.{part}")

    def layer_of(self, name: str) -> int | None:
        """The decoder layer of a tensor, by its name in the class or in files."""
        prefix = self.decoder_layers[0].removesuffix("0")
        return int(name.removeprefix(prefix).split(".")[0]) if name.startswith(prefix) else None


def outline_of(config: Config) -> Outline:
    """The outline of a supported model, original or patched.

    Args:
        config: the content of ``config.json``, after `check_counts` where it is not known to be sound.

    Raises:
        FamilyError: of no supported family, fields that the family does not accept, or no class can be built of it.
    """
    original_family(config).check(config)
    return _outline(json.dumps({name: value for name, value in config.items() if name not in FOREIGN}))


def build(config: Config, attention: str = "eager") -> Any:
    """The class of a model, on the meta device.

    Raises:
        FamilyError: the class cannot be built from this configuration.
    """
    from .. import models  # noqa: F401  (registers the classes of this package)

    kind, level = config["model_type"], logging.get_verbosity()
    logging.set_verbosity_error()  # the real loading repeats all warnings
    try:
        typed = CONFIG_MAPPING[kind].from_dict(deepcopy({n: v for n, v in config.items() if n not in FOREIGN}))
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(typed, attn_implementation=attention).eval()
    except Exception as error:  # a wrong value can fail anywhere in transformers
        raise FamilyError(
            f"config.json: no model of type {kind!r} can be built of it ({type(error).__name__}: {error})"
        ) from error
    finally:
        logging.set_verbosity(level)


@lru_cache(maxsize=8)
def _outline(text: str) -> Outline:
    config = json.loads(text)
    family, model = original_family(config), build(config)
    layers, blocks = _blocks(model)
    if not blocks:
        raise FamilyError("config.json: no layer is a mixture of experts; at least one is needed")
    experts = {layer: model.get_submodule(path).experts for layer, path in blocks.items()}
    counts = tuple(module.down_proj.shape[0] for module in experts.values())
    if min(counts) < 1:
        raise FamilyError("config.json: a MoE layer has no expert; accepted for every MoE layer: from 1")
    if sum(counts) > MOST_EXPERTS:
        raise FamilyError(f"config.json counts {sum(counts)} routed experts in all layers; accepted: {MOST_EXPERTS}")
    first = next(iter(experts.values()))
    block = model.get_submodule(next(iter(blocks.values())))
    shared = getattr(block, family.shared_name, None) if family.shared_name else None
    shape = MoeShape(
        layers=tuple(blocks),
        experts=max(counts),
        gate=family.gate(model.config),
        hidden=first.down_proj.shape[1],
        width=first.down_proj.shape[2],
        shared_width=0 if shared is None else shared.down_proj.weight.shape[1],
        counts=counts if LAYER_EXPERTS in config else None,
    )
    files, expert_names = _names(model, blocks)
    state = model.state_dict()
    tensors = {file: TensorSpec(tuple(state[name].shape), state[name].dtype) for name, file in files.items()}
    for (layer, _, projection), name in expert_names.items():
        dtype = state[f"{blocks[layer]}.experts.down_proj"].dtype
        tensors[name] = TensorSpec(shape.of(projection), dtype)
    tied = dict(model.all_tied_weights_keys)
    embedding, head = (_name(model, module) for module in (model.get_input_embeddings(), model.get_output_embeddings()))
    tied |= {other: name for name, other in tied.items()}
    renamings = tuple(one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming))
    names = (files, layers, blocks, expert_names)
    return Outline(family, shape, tensors, tied, *names, first.act_fn, embedding, head, renamings)


def _name(model: nn.Module, embedding: nn.Module) -> str:
    return next(f"{name}.weight" for name, module in model.named_modules() if module is embedding)


def _blocks(model: nn.Module) -> tuple[tuple[str, ...], dict[int, str]]:
    """Paths of all decoder layers, and of the blocks in them that own routed experts."""
    owners = [name.rpartition(".")[0] for name, module in model.named_modules() if hasattr(module, FUSED[0])]
    for owner in owners:
        parts = owner.split(".")
        for length in range(1, len(parts)):
            path = ".".join(parts[:length])
            if isinstance(layers := model.get_submodule(path), nn.ModuleList):
                found = tuple(f"{path}.{index}" for index in range(len(layers)))
                inside = [owner for owner in owners if owner.startswith(f"{path}.")]
                return found, {int(owner[len(path) + 1 :].split(".")[0]): owner for owner in inside}
    return (), {}


def _names(model: Any, blocks: Mapping[int, str]) -> tuple[dict[str, str], dict[tuple[int, int, str], str]]:
    """Names in files by names in the class; those of routed experts by layer, expert and projection.

    Transformers itself turns a state into that of files. Every tensor of this state holds its own number; those of
    stacked experts ``[N, 2, 1]`` hold a number for every matrix.
    """
    meaning: list[Any] = []
    state: dict[str, torch.Tensor] = {}
    stacked = {f"{path}.experts.{name}": (layer, name) for layer, path in blocks.items() for name in FUSED}
    for name, tensor in model.state_dict().items():
        if name not in stacked:
            state[name] = torch.tensor([len(meaning)])
            meaning.append(name)
            continue
        layer, kind = stacked[name]
        inside = ("gate_proj", "up_proj") if kind == FUSED[0] else ("down_proj",)
        numbers = torch.arange(len(tensor) * len(inside)) + len(meaning)
        state[name] = numbers.view(len(tensor), len(inside), 1)
        meaning += [(layer, expert, projection) for expert in range(len(tensor)) for projection in inside]
    files: dict[str, str] = {}
    expert_names: dict[tuple[int, int, str], str] = {}
    for name, numbers in revert_weight_conversion(model, state).items():
        means = meaning[int(numbers.flatten()[0])]
        if isinstance(means, str):
            files[means] = name
        else:
            expert_names[means] = name
    return files, expert_names


def check_tensors(outline: Outline, tensors: Mapping[str, TensorSpec]) -> list[str]:
    """Compare the tensors of files with those of a class.

    Returns:
        Names in the files that the class does not have.

    Raises:
        CheckpointError: a tensor of the class is in no file, has another shape, or a dtype that cannot be loaded.
    """
    for name, expected in outline.tensors.items():
        tensor = tensors.get(name)
        if tensor is None:
            if outline.tied.get(name) in tensors:
                continue
            raise CheckpointError(f"tensor {name} is missing: no file has it, and config.json makes it a part")
        if tensor.shape != expected.shape:
            raise CheckpointError(f"tensor {name} is {list(tensor.shape)}; config.json makes it {list(expected.shape)}")
        if expected.dtype.is_floating_point and not (tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1):
            raise CheckpointError(
                f"tensor {name} is {tensor.dtype}; accepted: bfloat16, float16, float32 (quantised files are not read)"
            )
    return [name for name in tensors if name not in outline.tensors]


def check_counts(config: Config, tensors: Mapping[str, TensorSpec]) -> None:
    """Refuse numbers of layers or experts that the files cannot hold, before a model is built.

    Args:
        tensors: all tensors of the files. A model has at most as many layers; experts may be rows of one tensor.

    Raises:
        FamilyError: a field is out of range.
    """
    rows = max((tensor.shape[0] for tensor in tensors.values() if tensor.shape and 0 not in tensor.shape), default=0)
    for name, value in config.items():
        most = max(len(tensors), LEAST, rows if "expert" in name else 0)
        if isinstance(value, dict):
            check_counts(value, tensors)
        elif type(value) is int and COUNTS.search(name) and not 0 <= value <= most:
            raise FamilyError(
                f"config.json: '{name}' is {value}; accepted for files of {len(tensors)} tensors: from 0 to {most}"
            )
