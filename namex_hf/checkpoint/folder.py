"""The output folder of a run: claimed, locked, resumable, and no model until it is whole.

While a run is under way the folder holds ``.namex/`` and no ``config.json``, so nothing can load it.
``.namex/run.json`` says which run it is; the same run finishes it, any other is refused. A finished folder is complete
where every file that its report lists is there with its size; else the same run makes it anew.
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
    found,
    hash_bytes,
    hash_file,
    read_json,
    write_text,
)
from .identity import Difference, Identity, differing, hash_weights, read_digests

STATE, RUN, LOCK = ".namex", "run.json", "lock"
DEVICE = "device"
"""Field of a run's file that its results do not have."""
ANEW = "anew"
"""In the state of a run that was begun by ``--overwrite``: the same command goes on, and does not begin once more."""
DAMAGED = {"damaged": True}
"""The run of a folder of ours that does not say which."""
FOLDERS = (OURS, "additional_chat_templates")
"""Folders whose files belong to a result, beside those at its top."""


def read_run(folder: Path) -> dict[str, Any] | None:
    """The run a folder belongs to, unfinished or complete; nothing for a folder that is not ours."""
    path = folder / STATE / RUN
    run = _read_object(path)
    if run is not None:
        return run
    if path.is_file() and (folder / STATE / LOCK).is_file():
        return DAMAGED
    run = (_read_object(found(folder, REPORT)) or {}).get("run")
    return run if isinstance(run, dict) else None


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except CheckpointError:
        return None


def list_files(folder: Path, config: str, known: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Size and hash of every file of a result but its report and what is rewritten later: the card and the pictures.

    Args:
        config: text of its ``config.json``, which is written last.
        known: of the files whose hashes are known.
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
    """The first file of a finished folder that is not as its report lists it, and what is wrong; None where all are.

    Args:
        verify: read every file and compare its hash too.
        only: compare sizes of files with these endings alone; the others need only be there.
    """
    files = (_read_object(found(folder, REPORT)) or {}).get("files")
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
    """Refuse a finished folder that lacks a file, or whose weights were cut. Text files may have been edited.

    Args:
        verify: read all files, and refuse any whose hash is another.

    Raises:
        CheckpointError: naming the file.
    """
    if reason := fault(folder, verify, (".safetensors",)):
        raise CheckpointError(f"{folder}: {reason}; the command that made the folder makes it whole again")


class OutputFolder:
    """A folder claimed for one run. Nothing is written outside it.

    Args:
        run: what makes the run this run (recipe, source, options), plain.
        identity: of the source, whose files are under ``files`` in `run`.
        verify: compare the hashes of a finished folder's files too.
        device: the kind that the run computes on: an unfinished run goes on on the same, for its bytes' sake. It is no
            part of the run, as results do not say it.
        resumes: patterns of what a finished folder that lost a file goes on from; all else is made anew.

    Raises:
        OutputError: a name that no folder can have, or a circle of links.
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

    def _difference(self, found: dict[str, Any]) -> Difference:
        """Between a run on record and this one; files of the source are read where their times differ."""
        if DEVICE not in self.run:
            found = {name: value for name, value in found.items() if name != DEVICE}
        return differing(found, self.run, self._identity, read_digests(self.state))

    @cached_property
    def fault(self) -> str | None:
        """What is wrong with a finished folder of this run; None where it is complete."""
        return fault(self.path, self._verify)

    @property
    def finished(self) -> bool:
        """Whether the folder is a finished one of this run, complete or not."""
        if not (self.path / CONFIG).is_file() or (previous := read_run(self.path)) is None:
            return False
        difference = self._difference(previous)
        return not difference and difference.proven

    @property
    def complete(self) -> bool:
        return self.finished and self.fault is None

    def check(self, overwrite: bool) -> None:
        """Refuse, without touching anything, a folder that holds something else.

        Raises:
            OutputError: a file, a foreign folder, or another run's (unless ``overwrite``, which is for ours alone).
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise OutputError(f"{self.path} is a file; --out needs a folder that is new, empty, or of the same run")
        if self._hardly_claimed():
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
        place = self.path
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        if free < needed:
            raise OutputError(f"{place} has {free / 1e9:.2f} GB free; the run needs {needed / 1e9:.2f} GB")

    @contextmanager
    def claimed(self, overwrite: bool) -> Iterator[None]:
        """Hold the folder for this run alone; the lock goes with the process, however it ends.

        Raises:
            OutputError: another process holds it.
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
        """Drop what this run cannot go on from, and say which run it is."""
        self.check(overwrite)  # once more: nobody else can change the folder now
        previous = read_run(self.path)
        if previous is not None:
            difference = self._difference(previous)
            same = not difference and difference.proven and not self._other_device(previous)
            lost = (self.path / CONFIG).exists() or not (self.state / RUN).exists()  # it was finished
            if overwrite and not (same and (self.state / ANEW).exists() and not lost):
                self._empty()
                (self.state / ANEW).touch()
            elif not same:
                self._empty()
            elif lost:
                self._empty(self._resumes)
            elif self._identity is not None:
                self._identity.take(read_digests(self.state) or {})
        if not (self.state / RUN).is_file():
            self._say_which()

    def begin_anew(self) -> None:
        """Drop all that an unfinished run has written, as its state is damaged."""
        self._empty()
        self._say_which()

    def finish(self, config: str) -> None:
        """Make the folder a model: the configuration last, then the state goes."""
        write_text(self.path / CONFIG, config)
        shutil.rmtree(self.state)

    def remove(self) -> None:
        """Take back what a run with bad input has written."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _hardly_claimed(self) -> bool:
        """Whether there is nothing, or what a run leaves that was killed before it could say which run it is."""
        start = {self.state, self.state / LOCK, self.state / (RUN + ".part"), self.state / ANEW}
        return set(self.path.rglob("*")) <= start

    def _empty(self, but: Iterable[str] = ()) -> None:
        # Marked first as ours and as nobody's run: killed half-way, what is left over can pass for neither run's work.
        write_text(self.state / RUN, json.dumps({"overwritten": True}))
        (self.path / CONFIG).unlink(missing_ok=True)  # no model any more, before a part of it goes
        kept = {self.state, *(path for pattern in but for path in self.path.glob(pattern))}
        for entry in [*self.path.iterdir(), *self.state.iterdir()]:
            if entry not in kept and entry not in (self.state / LOCK, self.state / RUN):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        (self.state / RUN).unlink()
