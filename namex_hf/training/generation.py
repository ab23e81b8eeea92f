"""Generation settings in training: every folder that is written has the file that the source has, byte for byte."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ..checkpoint.companions import companions
from ..files import write_bytes

NAME = "generation_config.json"


@contextmanager
def carried_settings(model: Any, source: Path | None, out: Path) -> Iterator[None]:
    """While it lasts `model` is saved to `out` without its generation settings; at the end those of `source` are there.

    transformers reads settings that it refuses to write (a temperature without sampling, say), and the trainer changes
    them: the model's own are written, unchecked, only where the source has none.

    Args:
        model: a causal language model, bare.
        source: folder of the checkpoint that training began with.
    """
    settings = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings
    file = next((path for path in companions(source) if path.name == NAME), None) if source is not None else None
    if file is not None:
        write_bytes(out / NAME, file.read_bytes())
    elif settings is not None:
        settings.to_json_file(str(out / NAME), use_diff=True, keys_to_pop=["compile_config"])
