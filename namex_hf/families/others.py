"""Check the tensors of causal models of other families, through transformers' own loading."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from ..errors import CheckpointError
from .outline import TensorSpec


def check_loading(folder: Path, tensors: Mapping[str, TensorSpec], trust_remote_code: bool) -> None:
    """Let transformers load the tensors of a folder on the meta device, without their values.

    A model that cannot be built so is not checked: of another kind, quantised, or with code that needs values.

    Args:
        folder: holds ``config.json`` and, for trusted remote code, that code.
        tensors: all tensors of its files.

    Raises:
        CheckpointError: a parameter of the class is in no file, or has another shape.
    """
    level, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = _build(folder, trust_remote_code)
        if model is not None:
            _check(model, {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in tensors.items()})
    finally:
        logging.set_verbosity(level)
        if had_bar:
            logging.enable_progress_bar()


def _build(folder: Path, trust_remote_code: bool) -> Any:
    """The model on the meta device; None where it cannot be built there."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if getattr(config, "quantization_config", None) is not None:
            return None
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # foreign code can fail in any way on this device: the real loading reports errors
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
    except RuntimeError as error:  # tensors that cannot be fused, such as experts of which one is missing
        expected = revert_weight_conversion(model, dict(model.state_dict()))
        missing = sorted(set(expected) - set(tensors) - set(model.all_tied_weights_keys))
        reason = f"tensor {missing[0]} is missing: no file has it" if missing else str(error)
        raise CheckpointError(f"the tensors do not fit the class {type(model).__name__}: {reason}") from error
    parameters = {name for name, _ in model.named_parameters()}  # foreign code may compute a buffer
    if missing := sorted(parameters & set(info["missing_keys"])):
        raise CheckpointError(f"tensor {missing[0]} is missing: no file has it, and {type(model).__name__} does")
    if info["mismatched_keys"]:
        name, shape, expected = min(info["mismatched_keys"])
        raise CheckpointError(f"tensor {name} is {list(shape)}; config.json makes it {list(expected)}")
