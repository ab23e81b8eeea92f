"""A loopback Hub, and children that know no other."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cli.toy import save_toy
from tests.hub.server import Hub, serving

ROOT = Path(__file__).parents[2]


class Answer(NamedTuple):
    status: int
    out: str
    err: str


Command = Callable[..., Answer]


@contextmanager
def child(home: Path, **environment: str) -> Iterator[Command]:
    """A process in which commands can be run; it sees no token, no cache and no Hub but those stated."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    kept |= {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "child.py")],
        env=kept | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def run(*arguments: object) -> Answer:
        process.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
        process.stdin.flush()
        return Answer(**json.loads(process.stdout.readline()))

    try:
        yield run
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


@pytest.fixture(scope="session")
def server() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the cache is."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def online(server: Hub, home: Path) -> Iterator[Command]:
    with child(home, HF_ENDPOINT=server.url) as run:
        yield run


@pytest.fixture(scope="module", autouse=True)
def forgotten(server: Hub) -> None:
    """What another file published or pushed."""
    server.folders.clear()
    server.private.clear()


@pytest.fixture
def hub(server: Hub, tmp_path: Path) -> Hub:
    """The Hub with an empty log, where nothing fails and nobody is known."""
    for what in (server.log, server.users, server.objects, server.renamed, server.gated):
        what.clear()
    server.root, server.failure = tmp_path / "hub", lambda method, path: None
    return server


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(tmp_path_factory.mktemp("published") / "q", tokenizer=True)
