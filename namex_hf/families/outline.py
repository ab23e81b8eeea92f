"""What the class of a model has: every tensor as its files name it, found by building the class without numbers."""

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
"""Fields of ``config.json`` that say nothing of a known class."""
COUNTS = re.compile(r"(^|_)(n|num)_(\w+_)?(layers?|experts|blocks)$")
"""Fields that say how many modules a class is made of."""
LEAST = 1000
"""Modules that any class may have, however few tensors its files hold: some share theirs."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: what can be known without its numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Outline:
    """All tensors of a class under the names of its files, experts one by one."""

    tensors: Mapping[str, Tensor]
    tied: Mapping[str, str]
    """Those that equal another one by definition; files need not hold them."""


def outline_of(config: Config) -> Outline:
    """The outline of a model of a class that transformers or this package has.

    Args:
        config: as ``config.json`` has it, its counts checked.

    Raises:
        FamilyError: the class cannot be built of this configuration.
    """
    return _outline(json.dumps({name: value for name, value in config.items() if name not in FOREIGN}))


@lru_cache(maxsize=8)
def _outline(text: str) -> Outline:
    from .. import models  # noqa: F401  (registers the classes of this package)

    config = json.loads(text)
    kind, level = config["model_type"], logging.get_verbosity()
    logging.set_verbosity_error()  # what there is to say is said when the model is loaded
    try:
        built = CONFIG_MAPPING[kind].from_dict(deepcopy(config))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(built, attn_implementation="eager")
    except Exception as error:  # whatever transformers makes of a value
        raise FamilyError(
            f"config.json: no model of type {kind!r} can be built of it ({type(error).__name__}: {error})"
        ) from error
    finally:
        logging.set_verbosity(level)
    found = revert_weight_conversion(model, dict(model.state_dict()))
    tensors = {name: Tensor(tuple(tensor.shape), tensor.dtype) for name, tensor in found.items()}
    tied = dict(model.all_tied_weights_keys)
    return Outline(tensors, tied | {other: name for name, other in tied.items()})


def check_tensors(outline: Outline, found: Mapping[str, Tensor]) -> list[str]:
    """Compare the tensors of files with those of a class.

    Returns:
        Names in the files that the class does not have.

    Raises:
        CheckpointError: a tensor of the class is in no file, has another shape, or is not of a kind of number that it
            can be loaded from.
    """
    for name, wanted in outline.tensors.items():
        tensor = found.get(name)
        if tensor is None:
            if outline.tied.get(name) in found:
                continue
            raise CheckpointError(f"tensor {name} is missing: no file has it, and config.json makes it a part")
        if tensor.shape != wanted.shape:
            raise CheckpointError(f"tensor {name} is {list(tensor.shape)}; config.json makes it {list(wanted.shape)}")
        if wanted.dtype.is_floating_point and not (tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1):
            raise CheckpointError(
                f"tensor {name} is {tensor.dtype}; accepted: bfloat16, float16, float32 (quantised files are not read)"
            )
    return [name for name in found if name not in outline.tensors]


def check_counts(config: Config, found: Mapping[str, Tensor]) -> None:
    """Refuse numbers of layers or experts that files cannot hold, before anything is built or counted up.

    Args:
        found: the tensors of the files. No class has more layers; experts may be rows of one.

    Raises:
        FamilyError: naming the field.
    """
    rows = max((tensor.shape[0] for tensor in found.values() if tensor.shape and 0 not in tensor.shape), default=0)
    for name, value in config.items():
        most = max(len(found), LEAST, rows if "expert" in name else 0)
        if isinstance(value, dict):
            check_counts(value, found)
        elif type(value) is int and COUNTS.search(name) and not 0 <= value <= most:
            raise FamilyError(
                f"config.json: '{name}' is {value}; accepted for files of {len(found)} tensors: from 0 to {most}"
            )
