"""A loopback Hub, and children that know no other."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.commands import Command, child
from tests.helpers.hub import Hub, serving
from tests.helpers.toy_models import save_toy

ROOT = Path(__file__).parents[2]


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
