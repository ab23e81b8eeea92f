"""The output folder of a run: locked and resumable, and not a model until it is complete.

During a run the folder holds ``.namex/`` and no ``config.json``, so no program can load it. ``.namex/run.json``
identifies the run; the same run continues it, any other run is refused. A finished folder is complete if every file in
its report exists with the listed size; else the same run repeats it.
"""

import errno
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import CheckpointError, OutputError
from ..files import (
    CARD,
    CONFIG,
    HASH,
    OURS,
    PAGE,
    REPORT,
    check_name,
    hash_bytes,
    hash_file,
    locate,
    read_json,
    write_text,
)
from .identity import Identity, RunDifference, differing, hash_weights, read_digests

STATE, RUN, LOCK = ".namex", "run.json", "lock"
DEVICE = "device"
"""Field of a run's file that its results do not have."""
ANEW = "anew"
"""Marks a run that ``--overwrite`` began: the same command continues it, and does not begin again."""
DAMAGED = {"damaged": True}
"""Stands for the run of a folder of this package whose record cannot be read."""
FOLDERS = (OURS, "additional_chat_templates")
"""Subfolders whose files belong to a result."""


def read_run(folder: Path) -> dict[str, Any] | None:
    """The run that wrote a folder, unfinished or complete; None for a folder that this package did not write."""
    path = folder / STATE / RUN
    run = _read_object(path)
    if run is not None:
        return run
    if path.is_file() and (folder / STATE / LOCK).is_file():
        return DAMAGED
    run = (_read_object(locate(folder, REPORT)) or {}).get("run")
    return run if isinstance(run, dict) else None


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except CheckpointError:
        return None


def list_files(folder: Path, config: str, known: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Size and hash of every file of a result, except its report, its card and its page, which are rewritten later.

    Args:
        config: text of its ``config.json``, which is written last.
        known: records of the files whose hashes are known.
    """
    data = config.encode()
    files = {CONFIG: {"bytes": len(data), HASH: hash_bytes(data)}}
    inside = [path for name in FOLDERS for path in (folder / name).glob("*")]
    for path in sorted((*folder.iterdir(), *inside)):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in (CONFIG, CARD, REPORT, PAGE) and not name.endswith(".part"):
            files[name] = dict(known.get(name) or {"bytes": path.stat().st_size, HASH: _hash(path)})
    return files


def _hash(path: Path) -> str:
    return hash_weights(path) if path.suffix == ".safetensors" else hash_file(path)


def fault(folder: Path, verify: bool = False, only: Iterable[str] | None = None) -> str | None:
    """The first difference between a finished folder and the files in its report, in words; None without difference.

    Args:
        verify: read every file and compare its hash too.
        only: compare sizes of files with these endings only; the others must only exist.
    """
    files = (_read_object(locate(folder, REPORT)) or {}).get("files")
    for name, listed in (files if isinstance(files, dict) else {}).items():
        path = folder / name
        if not isinstance(listed, dict) or Path(name).is_absolute() or ".." in Path(name).parts:
            return f"{name[:80]} is no file that a report can list"
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if (verify or only is None or name.endswith(tuple(only))) and size != listed.get("bytes"):
            return f"{name} has {size} bytes; {REPORT} lists {listed.get('bytes')}"
        if verify and (reason := _other_bytes(path, listed)):
            return f"{name} {reason}"
    return None


def _other_bytes(path: Path, listed: Mapping[str, Any]) -> str | None:
    try:
        return None if _hash(path) == listed.get(HASH) else f"has other bytes than {REPORT} lists"
    except CheckpointError as error:
        return f"is damaged ({error})"


def check_whole(folder: Path, verify: bool = False) -> None:
    """Refuse a finished folder that lacks a file, or whose weights have another size. Text files may be edited.

    Args:
        verify: read all files, and refuse a file with another hash.

    Raises:
        CheckpointError: a file is missing or differs.
    """
    if reason := fault(folder, verify, (".safetensors",)):
        raise CheckpointError(f"{folder}: {reason}; the command that made the folder makes it whole again")


class OutputFolder:
    """The folder of one run. Nothing is written outside it.

    Args:
        run: identity of the run (recipe, source, options), as plain values.
        identity: identity of the source, whose files are under ``files`` in `run`.
        verify: compare the hashes of a finished folder's files too.
        device: the kind of device that the run computes on. An unfinished run continues on the same kind alone. It is
            no part of the run, as results do not state it.
        resumes: patterns of the files that a finished but incomplete folder keeps; all others are written again.

    Raises:
        OutputError: the name is not possible for a folder, or is a circle of links.
    """

    def __init__(
        self,
        path: Path,
        run: dict[str, Any],
        identity: Identity | None = None,
        verify: bool = False,
        resumes: Iterable[str] = (),
        device: str | None = None,
    ):
        check_name(path, OutputError)
        self.path, self.run, self.state = path, json.loads(json.dumps(run)), path / STATE
        self._identity, self._verify, self._resumes, self._device = identity, verify, resumes, device

    def _difference(self, recorded: dict[str, Any]) -> RunDifference:
        """The difference between a recorded run and this run; reads files of the source whose times differ."""
        if DEVICE not in self.run:
            recorded = {name: value for name, value in recorded.items() if name != DEVICE}
        return differing(recorded, self.run, self._identity, read_digests(self.state))

    @cached_property
    def fault(self) -> str | None:
        """The first difference of a finished folder from its report, in words; None if it is complete."""
        return fault(self.path, self._verify)

    @property
    def finished(self) -> bool:
        """Whether this run has finished the folder, complete or not."""
        if not (self.path / CONFIG).is_file() or (previous := read_run(self.path)) is None:
            return False
        difference = self._difference(previous)
        return not difference and difference.proven

    @property
    def complete(self) -> bool:
        return self.finished and self.fault is None

    def check(self, overwrite: bool) -> None:
        """Refuse a folder that this run must not write, without a change to it.

        Raises:
            OutputError: the path is a file, a foreign folder, or (without ``overwrite``) the folder of another run.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise OutputError(f"{self.path} is a file; --out needs a folder that is new, empty, or of the same run")
        if self._is_unused():
            return
        previous = read_run(self.path)
        if previous is None:
            raise OutputError(f"{self.path} holds something else; --out needs a folder that is new, empty, or ours")
        if overwrite:
            return
        if previous == DAMAGED:
            raise OutputError(f"{self.state / RUN} is damaged; use --overwrite or another folder")
        if difference := self._difference(previous):
            files = f" ({', '.join(difference.files)}: other bytes)" if difference.files else ""
            if "files" in difference.fields and "files" not in previous:
                files = " (it does not say of which bytes it was made: a release before 0.2.0)"
            raise OutputError(
                f"{self.path} belongs to a run with another {difference}; use --overwrite or another folder{files}"
            )
        if begun := self._other_device(previous):
            raise OutputError(
                f"{self.path} was begun on device {begun}; this run is on {self._device}, which rounds in another way; "
                f"use --device {begun} or --overwrite"
            )

    def _other_device(self, found: dict[str, Any]) -> str | None:
        """The kind of device that a run on record computed on, where it is not that of this one."""
        begun = found.get(DEVICE)
        return begun if self._device not in (None, begun) else None

    def _say_which(self) -> None:
        device = {DEVICE: self._device} if self._device else {}
        write_text(self.state / RUN, json.dumps(self.run | device, indent=1))

    def check_space(self, needed: int) -> None:
        """Raises:
        OutputError: fewer bytes are free than the run still has to write.
        """
        existing = self.path
        while not existing.exists():
            existing = existing.parent
        free = shutil.disk_usage(existing).free
        if free < needed:
            raise OutputError(f"{existing} has {free / 1e9:.2f} GB free; the run needs {needed / 1e9:.2f} GB")

    @contextmanager
    def claimed(self, overwrite: bool) -> Iterator[None]:
        """Lock the folder for this run. The system releases the lock when the process ends.

        Raises:
            OutputError: another process holds the lock, or the disk is full.
        """
        self.state.mkdir(parents=True, exist_ok=True)
        try:
            held = FileLock(self.state / LOCK).acquire(blocking=False)
        except Timeout as error:
            raise OutputError(f"{self.path} is in use by another run") from error
        with held:
            self._prepare(overwrite)
            try:
                yield
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise OutputError("the disk is full; free some room and run the same command again to go on") from error
            (self.state / ANEW).unlink(missing_ok=True)

    def _prepare(self, overwrite: bool) -> None:
        """Delete the files that this run cannot continue from, and record the run."""
        self.check(overwrite)  # again: under the lock no other run can change the folder
        previous = read_run(self.path)
        if previous is not None:
            difference = self._difference(previous)
            same = not difference and difference.proven and not self._other_device(previous)
            was_finished = (self.path / CONFIG).exists() or not (self.state / RUN).exists()
            if overwrite and not (same and (self.state / ANEW).exists() and not was_finished):
                self._empty()
                (self.state / ANEW).touch()
            elif not same:
                self._empty()
            elif was_finished:
                self._empty(self._resumes)
            elif self._identity is not None:
                self._identity.add_digests(read_digests(self.state) or {})
        if not (self.state / RUN).is_file():
            self._say_which()

    def begin_anew(self) -> None:
        """Delete all files of an unfinished run, because its state is damaged."""
        self._empty()
        self._say_which()

    def finish(self, config: str) -> None:
        """Make the folder a model: write the configuration last, and delete the state."""
        write_text(self.path / CONFIG, config)
        shutil.rmtree(self.state)

    def remove(self) -> None:
        """Delete the folder after bad input."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _is_unused(self) -> bool:
        """Whether the folder is empty, or a run was killed in it before it recorded itself."""
        first_files = {self.state, self.state / LOCK, self.state / (RUN + ".part"), self.state / ANEW}
        return set(self.path.rglob("*")) <= first_files

    def _empty(self, but: Iterable[str] = ()) -> None:
        # First a record that matches no run: after a kill, neither run takes the remaining files for its own.
        write_text(self.state / RUN, json.dumps({"overwritten": True}))
        (self.path / CONFIG).unlink(missing_ok=True)  # the folder stops being a model before a part of it is deleted
        retained = {self.state, *(path for pattern in but for path in self.path.glob(pattern))}
        for entry in [*self.path.iterdir(), *self.state.iterdir()]:
            if entry not in retained and entry not in (self.state / LOCK, self.state / RUN):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        (self.state / RUN).unlink()
