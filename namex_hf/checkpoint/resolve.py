"""Resolution of MODEL, which is a folder, a packaged model or a Hub id, to a local folder."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    get_cached_repo_tree,
    get_hf_file_metadata,
    get_safetensors_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import validate_repo_id

from ..errors import CheckpointError, NamexError
from ..families import family_of
from ..files import BEFORE_0_2, CARD, CONFIG, INDEX, RECIPE, REPORT, SCORES, SINGLE, read_json
from ..printable import did_you_mean
from ..resources import PACKAGED, packaged_models
from .companions import companions, is_companion
from .header import DTYPES, TensorSpan
from .hub import UNREACHABLE, NoHubError, answer_of, hub_client, root_of, why
from .source import Checkpoint, open_checkpoint, read_index, refuse_adapter, without_weights
from .tokenizer_code import named_code, tokenizer_code

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
OURS = {name for new in (RECIPE, REPORT, SCORES) for name in (new, BEFORE_0_2[new])}
"""Small files of a patched model, fetched with it."""
MESSAGES = {  # a subclass before its base
    GatedRepoError: "asks for your consent on its Hub page, and for 'hf auth login'",
    RepositoryNotFoundError: "is no model of the Hub, or a private one, which needs 'hf auth login'",
    RevisionNotFoundError: "has no revision {revision}",
    RemoteEntryNotFoundError: f"has no {CONFIG}",
}


Check = Callable[[dict[str, Any]], object]
"""Checks a configuration before weights are fetched; raises an error if it is wrong."""


def resolve(source: str | Path, revision: str | None = None, check: Check = family_of) -> Checkpoint:
    """Open the checkpoint ``source``. Of a Hub id, weights are fetched only if its configuration passes ``check``.

    Raises:
        CheckpointError: no such folder, name or repository, no network, or a damaged checkpoint.
        FamilyError: the family of a Hub id is not supported; its weights are not fetched.
    """
    folder = local_folder(source)
    if folder is not None:
        if revision is not None:
            raise CheckpointError(f"--revision {revision} belongs to a Hub id; {source} is a local folder")
        companions(folder)  # refuses links that leave the folder before the run, not at its end; so does the next
        tokenizer_code(folder)
        return open_checkpoint(folder)
    return fetched(str(source), revision, check)


def local_folder(source: str | Path) -> Path | None:
    """The folder of a local path or a packaged model; None for a Hub id.

    Raises:
        CheckpointError: `source` is not a folder, a packaged model, or of the form of a Hub id.
    """
    if isinstance(source, str) and source in packaged_models():
        return PACKAGED / source
    if Path(source).is_dir():
        return Path(source)
    if not _is_hub_id(str(source)) or Path(source).exists():
        names, hint = ", ".join(packaged_models()), did_you_mean(source, packaged_models())
        raise CheckpointError(
            f"MODEL {source}: no such folder; accepted: a folder, a packaged model ({names}), or a Hub id "
            f"USER/NAME{hint}"
        )
    return None


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return HUB_ID.fullmatch(name) is not None


def peek(source: str | Path, revision: str | None = None) -> Checkpoint:
    """As `resolve`, but of a Hub id only the configuration and the headers of its shards are fetched."""
    name = str(source)
    if local_folder(source) is not None or _unreachable(name, revision):
        return resolve(source, revision)
    with _hub_errors(name, revision):
        config, commit = _configuration(name, revision)
        files = _files(name, commit, config.parent)
        _weights(name, commit, files)
        headers = get_safetensors_metadata(name, revision=commit).files_metadata
    unknown = {info.dtype for header in headers.values() for info in header.tensors.values()} - set(DTYPES)
    if unknown:
        raise CheckpointError(f"{name} has tensors of dtype {min(unknown)}; accepted: {', '.join(DTYPES)}")
    spans = {
        tensor: TensorSpan(config.parent / file, info.data_offsets[0], DTYPES[info.dtype], tuple(info.shape))
        for file, header in headers.items()
        for tensor, info in header.tensors.items()
    }
    shards = tuple(sorted({span.file for span in spans.values()}))
    checkpoint = Checkpoint(config.parent, read_json(config), shards, spans, commit, name)
    return replace(checkpoint, elsewhere=tuple(sorted(filter(is_companion, files))))


def fetched(name: str, revision: str | None, check: Check) -> Checkpoint:
    """Fetch a model of the Hub: its configuration, then weights, companions and the tokenizer's code, no other files.

    Args:
        name: ``USER/NAME``.

    Raises:
        CheckpointError: no such repository or revision, no network, no safetensors, or a damaged checkpoint.
    """
    offline = _unreachable(name, revision)
    with _hub_errors(name, revision, offline):
        config, commit = _configuration(name, revision, offline)
        check(read_json(config))
        files = _files(name, commit, config.parent, offline)
        weights = _weights(name, commit, files, offline)
        small = [file for file in files if is_companion(file) or file in {*OURS, CARD, INDEX}]  # CARD has the licence
        patterns = [escape(file) for file in {CONFIG, *weights, *small}]
        get = partial(snapshot_download, name, revision=commit, local_files_only=bool(offline))
        folder = Path(get(allow_patterns=patterns))
        while code := [file for file in named_code(folder) if file in files and not (folder / file).exists()]:
            get(allow_patterns=code)
    return open_checkpoint(folder, commit, name)


def _configuration(name: str, revision: str | None, offline: str = "") -> tuple[Path, str]:
    """The path of ``config.json``, and the commit of `revision`."""
    config = Path(hf_hub_download(name, CONFIG, revision=revision, local_files_only=bool(offline)))
    return config, config.parent.name


def _files(name: str, commit: str, folder: Path, offline: str = "") -> list[str]:
    """Names of all files of a commit; offline, of those in the cache."""
    try:
        return [file.path for file in get_cached_repo_tree(name, revision=commit)]
    except CachedRepoTreeNotFoundError:
        if offline:
            return [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
        return HfApi().list_repo_files(name, revision=commit)


def _weights(name: str, commit: str, files: list[str], offline: str = "") -> set[str]:
    """Names of the files that hold the tensors.

    Raises:
        CheckpointError: there are no such files, the index names a missing one, or an adapter is beside them.
    """
    refuse_adapter(name, files)
    if SINGLE in files:
        return {SINGLE}
    if INDEX not in files:
        message = without_weights(name, files)
        if offline and "pickle" not in message:
            raise CheckpointError(f"{name}: its weights are not in the local cache, and {_no_hub(offline)}")
        raise CheckpointError(message)
    weights = set(
        read_index(Path(hf_hub_download(name, INDEX, revision=commit, local_files_only=bool(offline)))).values()
    )
    if missing := sorted(weights.difference(files)):
        if offline:
            raise CheckpointError(f"{name}: {missing[0]} is not in the local cache, and {_no_hub(offline)}")
        raise CheckpointError(f"{name}: {INDEX} names {missing[0]}, which the repository does not have")
    return weights


def _unreachable(name: str, revision: str | None) -> str:
    """The reason why the Hub cannot be reached; empty if it can.

    This is a single request: the client would try for half a minute before it reads its cache.
    """
    try:
        with hub_client():
            get_hf_file_metadata(hf_hub_url(name, CONFIG, revision=revision))
    except (HfHubHTTPError, NoHubError):  # a response too; the download will get it again
        return ""
    except UNREACHABLE as error:
        return f"{type(error).__name__}: {error}"
    except Exception:  # after a response
        return ""
    return ""


def _no_hub(reason: str) -> str:
    return f"the Hub cannot be reached ({reason}); no network?"


@contextmanager
def _hub_errors(name: str, revision: str | None, offline: str = "") -> Iterator[None]:
    try:
        with hub_client():
            yield
    except NamexError:
        raise
    except SafetensorsParsingError as error:
        raise CheckpointError(f"{name}: {error}") from error
    except Exception as error:  # the client's errors have no common base class
        raise CheckpointError(f"{name} {_failed(error, revision, offline)}") from error


def _failed(error: Exception, revision: str | None, offline: str) -> str:
    root = root_of(error)
    messages = [text for kind, text in MESSAGES.items() if isinstance(root, kind)]
    if isinstance(root, HfHubHTTPError) and root.response.status_code == 401 and not messages:
        messages = ["needs a token that may read it: 'hf auth login'"]
    if messages and isinstance(root, HfHubHTTPError) and re.search("/api/|/resolve/", root.response.request.url.path):
        return f"{messages[0].format(revision=revision)} (the Hub answered {answer_of(root)})"
    if offline and isinstance(error, LocalEntryNotFoundError):
        extent = "only partly" if isinstance(error, IncompleteSnapshotError) else "not"
        return f"is no folder here, it is {extent} in the local cache of the Hub, and {_no_hub(offline)}"
    return f"cannot be fetched: {why(error)}"
