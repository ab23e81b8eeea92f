"""Generation settings during training: every written folder gets the file of the source, byte for byte."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ..checkpoint.companions import companions
from ..files import write_bytes

NAME = "generation_config.json"


@contextmanager
def carried_settings(model: Any, source: Path, out: Path) -> Iterator[None]:
    """Inside this context `model` is saved to `out` without generation settings; at its end `source` gives them.

    transformers reads settings that it refuses to write (such as a temperature without sampling), and the trainer
    changes them. The model's own settings are written, unchecked, only if the source has none.

    Args:
        model: a causal language model without wrappers.
        source: folder of the checkpoint that training began with.
    """
    settings = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings
    file = next((path for path in companions(source) if path.name == NAME), None)
    if file is not None:
        write_bytes(out / NAME, file.read_bytes())
    elif settings is not None:
        settings.to_json_file(str(out / NAME), use_diff=True, keys_to_pop=["compile_config"])
