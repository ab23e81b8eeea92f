"""From what a user names to a local folder: a folder, a packaged model, or a Hub id."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from huggingface_hub import (
    get_hf_file_metadata,
    get_safetensors_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import validate_repo_id

from ..errors import CheckpointError
from ..families import family_of
from ..files import CARD, CONFIG, INDEX, read_json
from .companions import PATTERNS
from .header import DTYPES, TensorSpan
from .source import Checkpoint, open_checkpoint

PACKAGED = Path(__file__).parent.parent / "packaged"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# OSError, and the HTTPError of whichever httpx the Hub client is built on.
UNREACHABLE = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)
ANSWERS = {  # a subclass before its base
    GatedRepoError: "asks for your consent on its Hub page, and for 'hf auth login'",
    RepositoryNotFoundError: "is no model of the Hub, or a private one, which needs 'hf auth login'",
    RevisionNotFoundError: "has no revision {revision}",
    RemoteEntryNotFoundError: "has no config.json",
}
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
    if isinstance(source, str) and source in packaged_models():
        return PACKAGED / source
    if Path(source).is_dir():
        return Path(source)
    if not _is_hub_id(str(source)) or Path(source).exists():
        names = ", ".join(packaged_models())
        raise CheckpointError(f"MODEL {source}: accepted: a folder, a packaged model ({names}), or a Hub id USER/NAME")
    return None


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return HUB_ID.fullmatch(name) is not None


def peek(source: str | Path, revision: str | None = None) -> Checkpoint:
    """As `resolve`, for a look: of a Hub id only the configuration and the headers of its shards are fetched."""
    name = str(source)
    if local_folder(source) is not None or not _reachable(name, revision):
        return resolve(source, revision)
    with _hub_errors(name, revision):
        config = Path(hf_hub_download(name, "config.json", revision=revision))
        match = COMMIT.search(config.parent.as_posix())
        found = get_safetensors_metadata(name, revision=match[1] if match else revision)
    unknown = {info.dtype for header in found.files_metadata.values() for info in header.tensors.values()} - set(DTYPES)
    if unknown:
        raise CheckpointError(f"{name} has tensors of dtype {min(unknown)}; accepted: {', '.join(DTYPES)}")
    spans = {
        tensor: TensorSpan(config.parent / file, info.data_offsets[0], DTYPES[info.dtype], tuple(info.shape))
        for file, header in found.files_metadata.items()
        for tensor, info in header.tensors.items()
    }
    shards = tuple(sorted({span.file for span in spans.values()}))
    return Checkpoint(config.parent, read_json(config), shards, spans, match[1] if match else None, name)


def _download(name: str, revision: str | None) -> tuple[Path, str | None]:
    cached = not _reachable(name, revision)
    with _hub_errors(name, revision):
        config = Path(hf_hub_download(name, "config.json", revision=revision, local_files_only=cached))
        family_of(read_json(config))
        match = COMMIT.search(config.parent.as_posix())
        commit = match[1] if match else None
        wanted = ["model*.safetensors", INDEX, CONFIG, CARD, *PATTERNS]  # the card, for its licence
        folder = Path(
            snapshot_download(name, revision=commit or revision, allow_patterns=wanted, local_files_only=cached)
        )
    if not any(folder.glob("model*.safetensors")):
        raise CheckpointError(f"{name} has no model*.safetensors; pickle files are never opened")
    return folder, commit


def _reachable(name: str, revision: str | None) -> bool:
    """Ask the Hub once: its client would ask for half a minute before it looks into its cache."""
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision))
    except HfHubHTTPError:  # an answer all the same, which the download will meet again
        return True
    except UNREACHABLE:
        return False
    return True


@contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except LocalEntryNotFoundError as error:
        raise CheckpointError(f"{name} is not in the local cache and the Hub cannot be reached: no network?") from error
    except SafetensorsParsingError as error:
        raise CheckpointError(f"{name}: {' '.join(str(error).split())}") from error
    except NotASafetensorsRepoError as error:
        raise CheckpointError(f"{name} has no safetensors; pickle files are never opened") from error
    except HfHubHTTPError as error:
        known = [text for kind, text in ANSWERS.items() if isinstance(error, kind)]
        text = known[0] if known else "cannot be fetched: " + " ".join(str(error).split())
        raise CheckpointError(f"{name} {text.format(revision=revision)}") from error
    except UNREACHABLE as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"{name} cannot be fetched ({reason}); no network?") from error
