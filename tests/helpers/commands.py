"""Commands in a process whose Hub is the one stated, and what they answer."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

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
        [sys.executable, str(Path(__file__).with_name("hub_child.py"))],
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


TOKEN = "hf_" + "secret0123456789abcdef"


WRONG = "hf_" + "wrong0123456789abcdefg"


def assert_refused(answer: Answer, *says: str) -> None:
    assert answer.status == 2, answer
    assert answer.out == ""
    *shown, last = answer.err.splitlines()
    assert last.startswith(("namex-push: error: ", "namex-patch: error: ")), answer.err
    assert not any("Traceback" in line or "rror" in line for line in shown), answer.err
    for text in says:
        assert text in last
    for token in (TOKEN, WRONG):
        assert token not in answer.err
