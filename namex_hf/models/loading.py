"""Open a folder that this package patched."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging

from ..errors import CheckpointError

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@contextmanager
def without_bar() -> Iterator[None]:
    """Inside this context transformers shows no progress bar of its own."""
    had_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bar:
            logging.enable_progress_bar()


def load_patched(path: str | Path, **kwargs: Any) -> Any:
    """The patched model in `path`, a folder or a Hub id: `AutoModelForCausalLM.from_pretrained` with two checks.

    Args:
        path: its ``config.json`` has the recipe under ``namex``.
        **kwargs: passed to `from_pretrained`.

    Raises:
        CheckpointError: no ``config.json``, no ``namex`` in it, or a tensor of the model that no file holds
            (transformers alone warns and continues with random values).
    """
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    try:
        raw, _ = PreTrainedConfig.get_config_dict(path, **hub)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no readable config.json: {str(error).splitlines()[0]}") from error
    if not raw:  # transformers returns an empty dict for a folder without the file
        raise CheckpointError(f"{path}: no config.json; accepted is a folder written by namex-patch")
    if not isinstance(raw.get("namex"), dict):
        raise CheckpointError(
            f"{path}/config.json: no recipe under 'namex' (model_type is {raw.get('model_type')!r}); accepted is a "
            "folder written by namex-patch"
        )
    returns_info = kwargs.pop("output_loading_info", False)
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(f"{path}: {len(missing)} tensors are in no file, the first is {missing[0]}")
    return (model, info) if returns_info else model
