"""The push of a checked folder in one commit, by default to a private repository."""

import re
import tempfile
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.constants import EVAL_RESULTS_FOLDER
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

from ..checkpoint.companions import TEMPLATES
from ..errors import PublishError
from ..files import BEFORE_0_2, CARD, CONFIG, INDEX, OURS, PICTURES, REPORT, read_bytes, write_text
from ..report.card import PLACE, linked
from ..report.card_metadata import put_block, read_block, usable
from ..report.card_text import put_section
from ..scrub import scrubbed
from .client import client
from .files import Selection

STALE = re.compile(
    rf"[^/]+\.safetensors|{re.escape(INDEX)}|[^/]+\.py|({OURS}|{BEFORE_0_2[PICTURES]}|{TEMPLATES})/.+|"
    rf"{re.escape(EVAL_RESULTS_FOLDER)}/[^/]+shot\.yaml|" + "|".join(map(re.escape, BEFORE_0_2.values()))
)
"""Files of an earlier push that a push deletes, unless it replaces them: old weights would be loaded."""
MESSAGE = "Push with namex_hf"
PULL_REQUEST = re.compile(r"refs/pr/\d+")


@dataclass(frozen=True)
class Target:
    """The target of a push."""

    repo: str
    """``USER/NAME``."""
    public: bool = False
    revision: str | None = None
    """A branch, created if it is missing, or ``refs/pr/N``; None: the main branch."""
    pull_request: bool = False

    def __post_init__(self) -> None:
        if self.pull_request and self.revision is not None:
            raise PublishError("--pull-request is made to the main branch; it does not go with --revision")


def push(selection: Selection, card: str, target: Target) -> str:
    """Create the repository if it is missing, and send the files that it does not have yet.

    The files are sent from a temporary folder of links, so that the folder itself does not change.

    Args:
        selection: files of a checked folder.
        card: replaces the folder's card; its snippet gets the repository's name.

    Returns:
        A line that says where the model is.

    Raises:
        PublishError: the repository holds another model, is public without consent, or cannot be written to; or the Hub
            or the network fails. The same call then continues.
    """
    token = get_token()
    for file in selection.files:
        if token and file.path.suffix != ".safetensors" and token.encode() in file.path.read_bytes():
            raise PublishError(f"{file.path} holds the token that is in use; take it out first")
    with client(target.repo) as api, tempfile.TemporaryDirectory(prefix="namex-push-") as staged:
        _ready(api, target)
        private = bool(api.model_info(target.repo).private)
        if not private and not target.public:
            raise PublishError(f"{target.repo} is public; say --public, or take another repository")
        names = api.list_repo_files(target.repo, revision=target.revision)
        if not target.pull_request:
            _check_ours(names, target)
        _stage(selection, completed(card, api, selection, target.repo), Path(staged))
        commit = api.upload_folder(
            repo_id=target.repo,
            folder_path=staged,
            revision=target.revision,
            create_pr=target.pull_request,
            delete_patterns=[escape(name) for name in names if STALE.fullmatch(name)],
            commit_message=MESSAGE,
        )
        address = f"{api.endpoint}/{target.repo}"
        if target.revision is not None:
            address += f"/tree/{target.revision}"
        seen_by = "private" if private else "public"
        return f"{scrubbed(commit.pr_url or address)} ({seen_by}, commit {commit.oid})"


def check_access(repo: str) -> None:
    """Check the token with the Hub, before hours of work.

    Raises:
        PublishError: no token, a refused token, or no connection to the Hub.
    """
    with client(repo) as api:
        api.whoami()


def _ready(api: HfApi, target: Target) -> None:
    if target.pull_request:
        return  # the repository exists, and may belong to another user
    api.create_repo(target.repo, private=not target.public, exist_ok=True)
    if target.revision is not None and not PULL_REQUEST.fullmatch(target.revision):
        api.create_branch(target.repo, branch=target.revision, exist_ok=True)


def _check_ours(names: list[str], target: Target) -> None:
    if CONFIG in names and not {*names} & {REPORT, BEFORE_0_2[REPORT]}:
        raise PublishError(
            f"{target.repo} holds a model that namex_hf did not write; accepted: a new or empty repository, one of an "
            "earlier push, or --pull-request"
        )


def completed(card: str, api: HfApi, selection: Selection, repo: str) -> str:
    """The card with the repository in its snippet and the pushed pictures; without a licence of its own, with the
    licence, languages and tags of the base model's card."""
    card = card.replace(f'"{PLACE}"', f'"{repo}"')
    pictures = [file.name for file in selection.files if re.fullmatch(PICTURES + r"/[^/]+\.png", file.name)]
    if pictures:
        card = put_section(card, "pictures", linked(pictures))
    block = read_block(card)
    base = block.get("base_model")
    if isinstance(base, str) and "license" not in block:
        inherited = _base_metadata(api, base, block.get("base_model_commit"))
        tags = list(dict.fromkeys([*block.get("tags", []), *inherited.pop("tags", [])]))
        card = put_block(card, block | {"tags": tags} | {key: inherited[key] for key in inherited if key not in block})
    return card


def _base_metadata(api: HfApi, base: str, commit: str | None) -> dict[str, Any]:
    """The usable metadata of the base model's card; empty without access to it."""
    try:
        path = api.hf_hub_download(base, CARD, revision=commit)
    except (RepositoryNotFoundError, EntryNotFoundError):
        return {}
    return usable(read_block(read_bytes(Path(path)).decode("utf-8", "replace")))


def _stage(selection: Selection, card: str, folder: Path) -> None:
    for file in selection.files:
        place = folder / file.name
        place.parent.mkdir(parents=True, exist_ok=True)
        if file.name == CARD:
            place.write_text(card, "utf-8")
        else:
            place.symlink_to(file.path.resolve())
    for name, text in selection.added.items():
        write_text(folder / name, text)
    for rewrite in selection.rewritten:
        rewrite(folder)
