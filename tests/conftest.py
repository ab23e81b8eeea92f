"""Helpers of the tests (`odd_checkpoints`, `float64_reference`) can be imported by name from every folder here."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from odd_checkpoints import odd_checkpoint


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``odd("deepseek", torch.float32, shards=2, ...)``: a checkpoint that must not be changed, made once."""
    made: dict[str, Path] = {}

    def make(*args, **changes) -> Path:
        key = repr((args, sorted(changes.items())))
        if key not in made:
            made[key] = odd_checkpoint(tmp_path_factory.mktemp("odd") / "model", *args, **changes)
        return made[key]

    return make
