"""The output folder of a run: claimed, locked, resumable, and no model until it is whole.

While a run is under way the folder holds ``.namex/`` and no ``config.json``, so nothing can load it.
``.namex/run.json`` says which run it is; the same run finishes it, any other is refused.
"""

import errno
import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import OutputError
from ..files import CONFIG, REPORT, check_name, found, read_json, write_text

STATE, RUN, LOCK = ".namex", "run.json", "lock"


def read_run(folder: Path) -> dict[str, Any] | None:
    """The run a folder belongs to, unfinished or complete; nothing for a folder that is not ours."""
    for path, key in ((folder / STATE / RUN, None), (found(folder, REPORT), "run")):
        try:
            values = read_json(path, OutputError)
        except OutputError:
            continue
        run = values.get(key) if key else values
        if isinstance(run, dict):
            return run
    return None


class OutputFolder:
    """A folder claimed for one run. Nothing is written outside it.

    Args:
        run: what makes the run this run (recipe, source, options); compared as JSON.

    Raises:
        OutputError: a name that no folder can have, or a circle of links.
    """

    def __init__(self, path: Path, run: dict[str, Any]):
        check_name(path, OutputError)
        self.path, self.run, self.state = path, json.loads(json.dumps(run)), path / STATE

    @property
    def complete(self) -> bool:
        return (self.path / CONFIG).is_file() and read_run(self.path) == self.run

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
        found = read_run(self.path)
        if found is None:
            raise OutputError(f"{self.path} holds something else; --out needs a folder that is new, empty, or ours")
        if found != self.run and not overwrite:
            changed = sorted(key for key in {*found, *self.run} if found.get(key) != self.run.get(key))
            raise OutputError(
                f"{self.path} belongs to a run with another {' and '.join(changed)}; use --overwrite or another folder"
            )

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
        with (self.state / LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise OutputError(f"{self.path} is in use by another run") from error
            previous = read_run(self.path)
            if overwrite and previous is not None and previous != self.run:
                self._empty()
            if not (self.state / RUN).is_file():
                write_text(self.state / RUN, json.dumps(self.run, indent=1))
            try:
                yield
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise OutputError("the disk is full; free some room and run the same command again to go on") from error

    def finish(self, config: dict[str, Any]) -> None:
        """Make the folder a model: the configuration last, then the state goes."""
        write_text(self.path / CONFIG, json.dumps(config, indent=2) + "\n")
        shutil.rmtree(self.state)

    def remove(self) -> None:
        """Take back what a run with bad input has written."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _hardly_claimed(self) -> bool:
        """Whether there is nothing, or what a run leaves that was killed before it could say which run it is."""
        start = {self.state, self.state / LOCK, self.state / (RUN + ".part")}
        return set(self.path.rglob("*")) <= start

    def _empty(self) -> None:
        # Marked first as ours and as nobody's run: killed half-way, what is left over can pass for neither run's work.
        write_text(self.state / RUN, json.dumps({"overwritten": True}))
        (self.path / CONFIG).unlink(missing_ok=True)  # no model any more, before a part of it goes
        for entry in self.path.iterdir():
            if entry.name != STATE:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        for entry in self.state.iterdir():
            if entry.name not in (LOCK, RUN):
                entry.unlink()
        (self.state / RUN).unlink()
