"""`finetune/sft_smoltalk.py` in processes of its own."""

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.process import script_process

sys.path.append(str(Path(__file__).parents[2] / "finetune"))  # what lies beside the scripts

SCRIPT = Path(__file__).parents[2] / "finetune" / "sft_smoltalk.py"
SMALL: dict[str, Any] = {
    "model_name_or_path": "tiny",
    "max_length": 128,
    "per_device_train_batch_size": 2,
    "max_steps": 5,
    "learning_rate": 1e-3,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_steps": 2,
    "held_out": 8,
    "scores": ["chats"],
    "bargain_every": 2,
    "disable_tqdm": True,
    "save_total_limit": 5,
}
"""Arguments of a run of seconds."""


def die_in_step(done: int) -> None:
    """Have this process killed by SIGKILL in the optimiser step after so many."""
    from transformers import Trainer

    step = Trainer.training_step

    def last(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == done:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **kwargs)

    Trainer.training_step = last


@pytest.fixture(scope="session")
def script() -> Path:
    return SCRIPT


@pytest.fixture(scope="session")
def dying() -> Callable[[int], None]:
    return die_in_step


@pytest.fixture(scope="session")
def small() -> dict[str, Any]:
    return SMALL


@dataclass
class Ended:
    code: int | None
    said: str
    """Standard output and error together."""
    out: Path

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.out / "namex/report.json").read_text("utf-8"))

    @property
    def losses(self) -> list[dict[str, float]]:
        return self.report["training"]["loss"]


@pytest.fixture(scope="session")
def call() -> Callable[[list[str], Path], tuple[int | None, str]]:
    """``call(arguments, log)``: exit status and all that was said."""

    def whole(arguments: list[str], log: Path) -> tuple[int | None, str]:
        process = script_process(SCRIPT, arguments, log)
        process.join()
        return process.exitcode, log.read_text("utf-8")

    return whole


@pytest.fixture(scope="session")
def start() -> Callable[..., Any]:
    """``start(out, "--use_peft", max_steps=3, ...)``: a run that has begun, its log beside `out`."""

    def begin(out: Path, *flags: str, die_after: int | None = None, **changes: Any) -> Any:
        config = out.with_suffix(".yaml")
        config.write_text(yaml.safe_dump({k: v for k, v in (SMALL | changes).items() if v is not None}))
        arguments = ["--config", str(config), "--output_dir", str(out), *flags]
        changes = [] if die_after is None else [partial(die_in_step, die_after)]
        return script_process(SCRIPT, arguments, out.with_suffix(".log"), changes=changes)

    return begin


@pytest.fixture(scope="session")
def run(start: Callable[..., Any]) -> Callable[..., Ended]:
    """A whole run."""

    def whole(out: Path, *flags: str, **changes: Any) -> Ended:
        process = start(out, *flags, **changes)
        process.join()
        return Ended(process.exitcode, out.with_suffix(".log").read_text("utf-8"), out)

    return whole


@pytest.fixture(scope="session")
def plain(run: Callable[..., Ended], tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """One undisturbed run of `SMALL`, which no test changes."""
    ended = run(tmp_path_factory.mktemp("plain") / "out")
    assert ended.code == 0, ended.said
    return ended
