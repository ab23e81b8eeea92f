"""How programs begin and end: one line, whatever goes wrong, and nothing in it that a terminal obeys."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.text import Text

from namex_hf.checkpoint.folder import STATE
from namex_hf.commands import inspect, patch
from namex_hf.commands.common import INTERRUPTED, ended
from namex_hf.errors import CheckpointError
from namex_hf.printable import marked

ROOT = Path(__file__).parents[2]
FOREIGN = "a\x1b[31m\x07\u202e\x9b\r\nb"
SHOWN = r"a\x1b[31m\x07\u202e\x9b b"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--out", "o", f"--{FOREIGN}"), f"unrecognized arguments: --{SHOWN}"),
        (("--out", "a\0b"), r"argument a\x00b: it has a NUL in it"),
        (("--out", "caf\udce9"), r"argument caf\udce9: it is not UTF-8"),
        (("--out", "o", "x" * 150_000), " ... xxx"),
    ],
)
def test_arguments(arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        patch.main(["tiny", *arguments])
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert said.out == ""
    assert said.err.startswith("namex-patch: error: ")
    assert says in said.err
    assert said.err.count("\n") == 1
    assert len(said.err) < 1200
    assert said.err[:-1].isprintable()


def test_outputs_in_a_circle(refused, toy: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for flags in ((), ("--dry-run",), ("--overwrite",)):
        assert "loop/out: Too many levels of symbolic links" in refused(toy, *flags, out=tmp_path / "loop" / "out")


def test_a_shard_size_of_many_digits(refused, toy: Path) -> None:
    assert "accepted: a size such as 5GB" in refused(toy, "--shard-size", 5000 * "9")


def tell(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (FileNotFoundError(2, "No such file or directory", "x/config.json"), 2, "x/config.json: No such file or dir"),
        (OSError(f"what\n{FOREIGN}"), 2, rf"error: what {SHOWN}"),
        (CheckpointError(FOREIGN), 2, f"error: {SHOWN}"),
        (CheckpointError(150_000 * "y"), 2, " ... yyy"),
        (MemoryError(), 2, "too little memory, or too little address space (ulimit -v): MemoryError"),
        (OSError(12, "Cannot allocate memory"), 2, "ulimit -v): OSError: [Errno 12] Cannot allocate memory"),
        (RuntimeError("std::bad_alloc"), 2, "ulimit -v): RuntimeError: std::bad_alloc"),
        (ImportError("x.so: failed to map segment from shared object"), 2, "ulimit -v): ImportError: x.so: failed"),
        (KeyboardInterrupt(), 130, "tool: stopped; the same command goes on from here"),
    ],
)
def test_endings(error: BaseException, status: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended("tool", lambda: tell(error)) == status
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert said[:-1].isprintable()
    assert len(said) < 1200


def test_an_allocation_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended("tool", lambda: print(torch.empty(1 << 50).shape)) == 2
    assert "too little memory" in (said := capsys.readouterr().err)
    assert str(4 << 50) in said  # what was needed


def test_faults_of_ours_stay_loud() -> None:
    for error in (RuntimeError("a fault"), AssertionError("a fault"), ValueError("a fault")):
        with pytest.raises(type(error), match="a fault"):
            ended("tool", lambda error=error: tell(error))
    assert ended("tool", lambda: tell(ValueError("of the user")), more=ValueError) == 2
    assert ended("tool", lambda: None) == 0


def test_names_that_look_like_markup() -> None:
    for name in ("a [v1] b", "a[/b]c", "[bold red]x", "back\\", f"[link=x]{FOREIGN}"):
        console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
        console.print(f"[bold]{marked(name)}[/bold]", emoji=False, highlight=False)
        shown = console.export_text().rstrip("\n")
        assert shown == str(Text(name.replace(FOREIGN, SHOWN)))


def test_a_dry_run_shows_foreign_names_escaped(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied.rename(copied.parent / "m[bold]\x1b[31m\u202e")
    (folder / "LICENSE-\x1b]0;x[v1]").write_text("text")
    assert patch.main([str(folder), "--out", str(tmp_path / "o[v1]\x1b"), "--dry-run"]) == 0
    assert inspect.main([str(folder)]) == 0
    assert patch.main([str(folder), "--out", str(tmp_path / "o[v1]\x1b")]) == 0
    said = capsys.readouterr()
    assert not {"\x1b", "\u202e"} & set(said.out + said.err)
    assert "m[bold]" in said.out.replace("\n", "")
    assert r"o[v1]\x1b" in said.out.replace("\n", "")


def maps(process: subprocess.Popen[str]) -> str:
    try:
        return Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:
        return ""


def installed(name: str, folder: Path) -> Path:
    """What an installer makes of a command."""
    module, function = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"][name].split(":")
    program = folder / name
    program.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    return program


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see what is being imported")
@pytest.mark.parametrize("name", ["namex-patch", "eval/zero_shot.py", "finetune/sft_smoltalk.py"])
def test_an_interrupt_while_torch_is_imported(name: str, tmp_path: Path) -> None:
    patches = name == "namex-patch"
    program = installed(name, tmp_path) if patches else ROOT / name
    arguments = ["tiny", "--out", tmp_path / "out"] if patches else ["--output_path", tmp_path / "out"]
    if name.startswith("finetune"):
        arguments = ["--help"]  # which TRL writes
    run = subprocess.Popen(
        [sys.executable, program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    while "libtorch" not in maps(run) and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate()
    assert (run.returncode, out, err) == (INTERRUPTED, "", f"{program.name}: stopped\n")


def test_sigterm_stops_a_run_that_the_same_command_continues(tmp_path: Path) -> None:
    command = [sys.executable, installed("namex-patch", tmp_path), "tiny", "--out", tmp_path / "out", "--keep", "0.5"]
    command += ["--calibration-tokens", "16384"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    arrived = tmp_path / "out" / STATE / "arrived.safetensors"
    while not arrived.exists() and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate()
    assert run.returncode == INTERRUPTED
    assert err.endswith("namex-patch: stopped; the same command goes on from here\n")
    again = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=environment, check=True)
    assert re.search(r"continuing: [1-4] of 5 layers done\n", again.stderr)


def test_too_little_address_space_while_torch_is_imported(tmp_path: Path) -> None:
    limit = 300 << 20  # torch cannot be mapped; with a little more it is, and its own start aborts
    run = subprocess.run(
        [sys.executable, installed("namex-patch", tmp_path), "tiny", "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        check=False,
    )
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("namex-patch: error: too little memory, or too little address space (ulimit -v)")
    assert run.stderr.count("\n") == 1
