"""What holds for every test; helpers are in `tests/helpers/`, by subject."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.toy_models import odd_checkpoint, write_words


def pytest_collection_finish() -> None:
    """Leave what the imports made out of every later garbage collection, which would go through all of it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """A test that replaces the object `os.environ` fails: rich and others keep reading the old one."""
    before = os.environ
    yield
    after, os.environ = os.environ, before
    assert after is before, "os.environ was replaced"


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


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration text for odd checkpoints; not to be changed."""
    return write_words(tmp_path_factory.mktemp("text") / "words.txt", 1)
