"""Outline of a model class: every tensor under its name in files, from building the class on the meta device."""

import json
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from ..errors import CheckpointError, FamilyError
from .family import Config

FOREIGN = ("auto_map", "_name_or_path")
"""Fields of ``config.json`` without influence on a known class."""
COUNTS = re.compile(r"(^|_)(n|num)_(\w+_)?(layers?|experts|blocks)$")
"""Names of fields that count the modules of a class."""
LEAST = 1000
"""Number of modules accepted for any class, however few tensors its files hold: modules can share tensors."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Outline:
    """All tensors of a class under their names in files, with every expert apart."""

    tensors: Mapping[str, TensorSpec]
    tied: Mapping[str, str]
    """Tied tensors, both ways, by name: files need to hold only one of the two."""


def outline_of(config: Config) -> Outline:
    """The outline of a model whose class belongs to transformers or to this package.

    Args:
        config: the content of ``config.json``, after `check_counts`.

    Raises:
        FamilyError: the class cannot be built from this configuration.
    """
    return _outline(json.dumps({name: value for name, value in config.items() if name not in FOREIGN}))


@lru_cache(maxsize=8)
def _outline(text: str) -> Outline:
    from .. import models  # noqa: F401  (registers the classes of this package)

    config = json.loads(text)
    kind, level = config["model_type"], logging.get_verbosity()
    logging.set_verbosity_error()  # the real loading repeats all warnings
    try:
        typed = CONFIG_MAPPING[kind].from_dict(deepcopy(config))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(typed, attn_implementation="eager")
    except Exception as error:  # a wrong value can fail anywhere in transformers
        raise FamilyError(
            f"config.json: no model of type {kind!r} can be built of it ({type(error).__name__}: {error})"
        ) from error
    finally:
        logging.set_verbosity(level)
    in_files = revert_weight_conversion(model, dict(model.state_dict()))
    tensors = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in in_files.items()}
    tied = dict(model.all_tied_weights_keys)
    return Outline(tensors, tied | {other: name for name, other in tied.items()})


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
