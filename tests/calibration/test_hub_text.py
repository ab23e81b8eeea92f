"""Data sets of a Hub on the loopback interface, streamed by the real library in a process that knows no other Hub."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from namex_hf.calibration.hub_source import FORM
from namex_hf.checkpoint.resolve import PACKAGED
from tests.helpers.hub import Hub, serving

pytest.importorskip("datasets", reason="the extra 'train' is not installed")
REFUSED = {  # and what is said of them
    "me/none": "there is none of that name",
    "me/texts:french": "BuilderConfig 'french' not found",
    "me/texts:default:dev": "Available splits: ['train', 'test']",
    "me/others": "a row of me/others: accepted: a list of 'messages' or a 'text'; found: question, split",
    "me/damaged": "me/damaged is no file or folder, and as a Hub data set",
}
ROOT = Path(__file__).parents[2]
CHILD = """
import json, sys
from transformers import AutoTokenizer
from namex_hf.calibration.text import calibration_text
from namex_hf.errors import CalibrationError
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
for source, seed in json.loads(sys.argv[2]):
    try:
        text = calibration_text(source, tokenizer, 2048, 64, seed)
        print(json.dumps({"name": text.name, "sha256": text.sha256, "said": tokenizer.decode(text.ids.flatten())}))
    except CalibrationError as error:
        print(json.dumps({"error": str(error)}))
"""


def ask(home: Path, endpoint: str, *asked: tuple[str, int]) -> list[dict[str, Any]]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    kept |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-c", CHILD, str(PACKAGED / "tiny"), json.dumps(asked)]
    done = subprocess.run(command, env=kept, cwd=home, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("published")
    with serving() as found:
        for name, column, values in (
            ("texts", "text", [f"This is row {n} of the data set. " * 5 for n in range(500)]),
            ("chats", "messages", [[{"role": "user", "content": f"This is question {n}?"}] for n in range(500)]),
            ("others", "question", ["What is this?"]),
        ):
            (folder / name).mkdir()
            for split in ("train", "test"):
                lines = "".join(json.dumps({column: value, "split": split}) + "\n" for value in values)
                (folder / name / f"{split}.jsonl").write_text(lines.replace("This", split))
            found.add(f"me/{name}", folder / name)
        (folder / "damaged").mkdir()
        whole = gzip.compress(b'{"text": "a"}\n' * 9)
        (folder / "damaged" / "train-0.jsonl.gz").write_bytes(whole)  # what the library guesses the columns from
        (folder / "damaged" / "train-1.jsonl.gz").write_bytes(whole[:-12])
        found.add("me/damaged", folder / "damaged")
        yield found


@pytest.fixture(scope="module")
def answers(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict[str, Any]]:
    """To everything that the tests ask, of one process: its imports take longer than its answers."""
    asked = [(source, 0) for source in ("me/texts", "me/texts:default", "me/texts:default:test", "me/chats", *REFUSED)]
    asked.append(("me/texts", 1))
    return dict(zip(asked, ask(tmp_path_factory.mktemp("home"), hub.url, *asked), strict=True))


def test_data_sets(hub: Hub, answers: dict[tuple[str, int], dict[str, Any]]):
    texts, chats, test = (answers[name, 0] for name in ("me/texts", "me/chats", "me/texts:default:test"))
    assert texts["name"] == f"me/texts@{hub.commit('me/texts')}"
    assert texts["said"].count("train is row ") > 20
    assert answers["me/texts:default", 0]["sha256"] == texts["sha256"]
    assert answers["me/texts", 1]["sha256"] != texts["sha256"]
    assert "<|im_start|>user\ntrain is question " in chats["said"]
    assert test["name"] == f"me/texts:default:test@{hub.commit('me/texts')}"
    assert test["said"].count("test is row ") > 20
    rows = [said.split(" ")[3] for said in texts["said"].split("<|endoftext|>") if said.startswith("train is row ")]
    assert rows != sorted(rows, key=int)


@pytest.mark.parametrize("source", REFUSED)
def test_what_cannot_be_had(answers: dict[tuple[str, int], dict[str, Any]], source: str):
    said = answers[source, 0]["error"]
    assert REFUSED[source] in said
    assert "\n" not in said
    assert "calibration data" in said or "a row of" in said


def test_without_a_network(tmp_path: Path):
    said = ask(tmp_path, "http://127.0.0.1:9", ("no/network", 0))[0]["error"]
    assert f"no/network is no file or folder, and as a Hub data set {FORM} it cannot be read: ConnectError" in said
