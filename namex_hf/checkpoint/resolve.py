"""From what a user names to a local folder: a folder, a packaged model, or a Hub id."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from huggingface_hub import get_safetensors_metadata, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
)

from ..errors import CheckpointError
from ..families import family_of
from .companions import PATTERNS
from .header import DTYPES, TensorSpan
from .source import INDEX, Checkpoint, open_checkpoint, read_json

PACKAGED = Path(__file__).parent.parent / "packaged"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# OSError, and the HTTPError of whichever httpx the Hub client is built on.
UNREACHABLE = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)
COMMIT = re.compile(r"/snapshots/([0-9a-f]{40})/?$")


def packaged_models() -> list[str]:
    """Names of the models inside this package."""
    return sorted(path.parent.name for path in PACKAGED.glob("*/config.json"))


def resolve(source: str | Path, revision: str | None = None) -> Checkpoint:
    """Open what ``source`` names; a Hub id is downloaded (configuration first, weights only of a supported family).

    Raises:
        CheckpointError: no such folder, name or repository, no network, or a damaged checkpoint.
        FamilyError: a Hub id of an unsupported family, before its weights are fetched.
    """
    folder = local_folder(source)
    if folder is not None:
        if revision is not None:
            raise CheckpointError(f"--revision {revision} belongs to a Hub id; {source} is a local folder")
        return open_checkpoint(folder)
    name = str(source)
    folder, commit = _download(name, revision)
    return open_checkpoint(folder, commit, name)


def local_folder(source: str | Path) -> Path | None:
    """The folder of a local path or a packaged model; nothing for a Hub id.

    Raises:
        CheckpointError: neither a folder, nor a packaged model, nor the form of a Hub id.
    """
    if Path(source).is_dir():
        return Path(source)
    if str(source) in packaged_models():
        return PACKAGED / str(source)
    if not HUB_ID.fullmatch(str(source)) or Path(source).exists():
        names = ", ".join(packaged_models())
        raise CheckpointError(f"MODEL {source}: accepted: a folder, a packaged model ({names}), or a Hub id USER/NAME")
    return None


def peek(source: str | Path, revision: str | None = None) -> Checkpoint:
    """As `resolve`, for a look: of a Hub id only the configuration and the headers of its shards are fetched."""
    folder = local_folder(source)
    if folder is not None:
        return resolve(source, revision)
    name = str(source)
    with _hub_errors(name):
        config = Path(hf_hub_download(name, "config.json", revision=revision))
        match = COMMIT.search(config.parent.as_posix())
        found = get_safetensors_metadata(name, revision=revision)
    spans = {
        tensor: TensorSpan(config.parent / file, info.data_offsets[0], DTYPES[info.dtype], tuple(info.shape))
        for file, header in found.files_metadata.items()
        for tensor, info in header.tensors.items()
    }
    shards = tuple(sorted({span.file for span in spans.values()}))
    return Checkpoint(config.parent, read_json(config), shards, spans, match[1] if match else None, name)


def _download(name: str, revision: str | None) -> tuple[Path, str | None]:
    with _hub_errors(name):
        config = Path(hf_hub_download(name, "config.json", revision=revision))
        family_of(read_json(config))
        match = COMMIT.search(config.parent.as_posix())
        commit = match[1] if match else None
        wanted = ["model*.safetensors", INDEX, "config.json", *PATTERNS]
        return Path(snapshot_download(name, revision=commit or revision, allow_patterns=wanted)), commit


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise CheckpointError(f"{name} is not in the local cache and the Hub cannot be reached: no network?") from error
    except NotASafetensorsRepoError as error:
        raise CheckpointError(f"{name} has no safetensors; pickle files are never opened") from error
    except HfHubHTTPError as error:
        raise CheckpointError(f"{name}: the Hub answers {str(error).strip().splitlines()[0]}") from error
    except UNREACHABLE as error:
        raise CheckpointError(f"{name}: the Hub cannot be reached ({type(error).__name__}); no network?") from error
