"""Selection of the files to push: files with known names. All other files stay, each with a reason."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..checkpoint.companions import TOKENIZER_CONFIG, companions, without_auto_map
from ..checkpoint.rewrite import rewrite
from ..checkpoint.source import Checkpoint
from ..checkpoint.tokenizer_code import tokenizer_code
from ..errors import PublishError
from ..files import (
    BEFORE_0_2,
    CARD,
    CONFIG,
    HASH,
    INDEX,
    PICTURES,
    RECIPE,
    REPORT,
    SCORES,
    STATISTICS,
    hash_bytes,
    read_json,
    write_bytes,
    write_text,
)
from ..models import remote_code

OURS = (CONFIG, INDEX, CARD, REPORT, SCORES, RECIPE, STATISTICS)
PICTURE = re.compile(PICTURES + r"/[^/]+\.(?:png|svg|html)")
FOLDERS = re.compile(r"adapter|compare|checkpoint-\d+")
"""Folders of a fine-tuning run that are pushed only on request."""
INSIDE = (".safetensors", ".json", ".jinja", ".txt", ".md", ".yaml", ".py", ".png", ".svg", ".html")
"""Suffixes of the files that are pushed from such a folder."""
TRACES = re.compile(
    r"optimizer|scheduler|rng_state|trainer_state|training_args|scaler|[._]log|events\.out|"
    r"(?:^|/)(?:runs|\.namex|checkpoint-\d+)/"
)
"""Parts of the names of files that belong to a run and not to its result."""


@dataclass(frozen=True)
class Upload:
    """A file to push."""

    name: str
    """Name in the repository: the path below the folder, with slashes."""
    path: Path
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Selection:
    """The files to push, and the other files with their reasons."""

    files: tuple[Upload, ...]
    left_out: dict[str, str]
    rewritten: tuple[Callable[[Path], None], ...] = ()
    """Functions that rewrite files in a folder of links to `files`: weights without left-out tensors, a configuration
    with the current ``auto_map``, a tokenizer's without one, and the report that lists it."""
    added: Mapping[str, str] = field(default_factory=dict)
    """Content of files that the folder does not have, by name."""

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by name."""
        added = {name: len(text.encode()) for name, text in self.added.items()}
        return {file.name: file.size for file in self.files} | added


def select(checkpoint: Checkpoint, include: tuple[str, ...] = (), tensors: tuple[str, ...] = ()) -> Selection:
    """The files of a patched folder that belong on the Hub.

    Args:
        tensors: names of the tensors to leave out.
        include: folders of a fine-tuning run to push too: ``adapter``, ``compare``, ``checkpoint-N``.

    Raises:
        PublishError: `include` has another value, or a necessary file is a link that leaves the folder.
    """
    folder = checkpoint.folder
    for name in include:
        if not FOLDERS.fullmatch(name) or not (folder / name).is_dir():
            raise PublishError(f"--include {name}: accepted: adapter, compare or checkpoint-N, where {folder} has it")
    known = _known_names(checkpoint)
    code = current_code(checkpoint)
    files, left_out = [Upload(path.name, path, path.stat().st_size) for path in code], {}
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()):
        name = path.relative_to(folder).as_posix()
        place = current_place(name)
        if any(place == file.name for file in code):
            continue
        reason = _reason_to_stay(path, place, folder, known, include)
        if reason is None and place != name and (folder / place).exists():
            reason = f"{place} is there too"
        if reason is None:
            files.append(Upload(place, path, path.stat().st_size))
        elif place in known and reason == LINK:
            raise PublishError(f"{path} is a link that leaves the folder; needed: the file itself")
        else:
            left_out[name] = reason
    weights = (partial(rewrite, checkpoint, tensors),) if tensors else ()
    configuration = (partial(_write_auto_map, checkpoint),) if code else ()
    foreign = [path.name for path in tokenizer_code(folder)]
    tokenizer = (partial(_leave_code_out, foreign),) if foreign else ()
    return Selection(tuple(sorted(files, key=lambda file: file.name)), left_out, (*weights, *configuration, *tokenizer))


def current_code(checkpoint: Checkpoint) -> tuple[Path, ...]:
    """Files of this package that replace the code of a folder from an earlier release; else nothing.

    Earlier code has fewer classes, and supports fewer versions of transformers.
    """
    code = remote_code(str(checkpoint.config.get("model_type")))
    stated = checkpoint.config.get("auto_map")
    is_earlier = isinstance(stated, dict) and bool(stated) and stated.items() < code.auto_map.items()
    return code.files if is_earlier else ()


def _write_auto_map(checkpoint: Checkpoint, folder: Path) -> None:
    code = remote_code(str(checkpoint.config["model_type"]))
    (folder / CONFIG).unlink()
    write_text(folder / CONFIG, json.dumps({**checkpoint.config, "auto_map": code.auto_map}, indent=2) + "\n")


def _leave_code_out(names: list[str], folder: Path) -> None:
    """Take the pointer to a tokenizer's code from its configuration, and these files from the report's list."""
    report, data = read_json(folder / REPORT), without_auto_map((folder / TOKENIZER_CONFIG).read_bytes())
    if isinstance(files := report.get("files"), dict):
        report["files"] = {name: listed for name, listed in files.items() if name not in names}
        report["files"][TOKENIZER_CONFIG] = {"bytes": len(data), HASH: hash_bytes(data)}
    for name, content in ((TOKENIZER_CONFIG, data), (REPORT, json.dumps(report, indent=1).encode() + b"\n")):
        (folder / name).unlink()  # a link
        write_bytes(folder / name, content)


def current_place(name: str) -> str:
    """The current place of a file that a release before 0.2.0 wrote; other names do not change."""
    for now, before in BEFORE_0_2.items():
        if name == before or name.startswith(f"{before}/"):
            return now + name.removeprefix(before)
    return name


LINK = "a link that leaves the folder"


def _known_names(checkpoint: Checkpoint) -> set[str]:
    folder, config = checkpoint.folder, checkpoint.config
    code = {path.name for path in remote_code(str(config.get("model_type"))).files}
    return {
        *OURS,
        *(shard.name for shard in checkpoint.shards),
        *(path.relative_to(folder).as_posix() for path in companions(folder)),
        *code,
    }


def _reason_to_stay(path: Path, name: str, folder: Path, known: set[str], include: tuple[str, ...]) -> str | None:
    """The reason why a file is not pushed; None if it is."""
    top = name.split("/")[0]
    if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        return LINK
    if top in include:
        if path.suffix not in INSIDE:
            return _kind(name)
        return "of a run" if TRACES.search(name.removeprefix(f"{top}/")) else None
    if name in known or PICTURE.fullmatch(name):
        return None
    if FOLDERS.fullmatch(top):
        return f"goes up with --include {top}"
    return _kind(name)


def _kind(name: str) -> str:
    if name.startswith("."):
        return "hidden"
    if name.lower().endswith(".py"):
        return "code that is not of this model's class"
    if name.lower().endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")):
        return "a pickle"
    return "not of the model"


def summarised(left_out: dict[str, str]) -> dict[str, str]:
    """`left_out` with a single entry for the files of an outermost folder that have the same reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, reason in left_out.items():
        top, *rest = name.split("/")
        groups.setdefault((f"{top}/" if rest else top, reason), []).append(name)
    return {
        f"{top} ({len(names)} files)" if len(names) > 1 else names[0]: reason for (top, reason), names in groups.items()
    }
