"""Causal models of families that are not described here: are all their tensors there?"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from ..errors import CheckpointError
from .outline import Tensor


def check_loading(folder: Path, found: Mapping[str, Tensor], trust_remote_code: bool) -> None:
    """Have transformers load the tensors of files on the meta device, which reads no number.

    Nothing is checked of a model that cannot be built so: of another kind, quantised, with code that needs numbers.

    Args:
        folder: with ``config.json`` and, where it is trusted, the code.

    Raises:
        CheckpointError: a parameter of the class is in no file, or has another shape.
    """
    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = _built(folder, trust_remote_code)
        if model is not None:
            _check(model, {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in found.items()})
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _built(folder: Path, trust_remote_code: bool) -> Any:
    """The class without numbers; None where that cannot be had."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if getattr(config, "quantization_config", None) is not None:
            return None
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # whatever foreign code makes of the device: the real loading says what is wrong
        return None


def _check(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    try:
        _, info = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=dict(tensors),
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except RuntimeError as error:  # tensors that do not fit together, one of many experts that is missing
        wanted = revert_weight_conversion(model, dict(model.state_dict()))
        missing = sorted(set(wanted) - set(tensors) - set(model.all_tied_weights_keys))
        reason = f"tensor {missing[0]} is missing: no file has it" if missing else str(error)
        raise CheckpointError(f"the tensors do not fit the class {type(model).__name__}: {reason}") from error
    own = {name for name, _ in model.named_parameters()}  # a buffer may be computed, in code that is not known
    if missing := sorted(own & set(info["missing_keys"])):
        raise CheckpointError(f"tensor {missing[0]} is missing: no file has it, and {type(model).__name__} does")
    if info["mismatched_keys"]:
        name, there, wanted = min(info["mismatched_keys"])
        raise CheckpointError(f"tensor {name} is {list(there)}; config.json makes it {list(wanted)}")
