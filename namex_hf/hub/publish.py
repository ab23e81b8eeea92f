"""The push of a patched folder to the Hub, after its checks."""

import sys
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars
from rich.console import Console

from ..errors import PublishError
from ..evaluation.table import Table
from ..files import size_text
from ..printable import marked, printable
from .checks import CheckedFolder, check_folder
from .client import check_repo
from .files import Selection, select, summarised
from .push import Target, check_access, push


def checked_target(repo: str | None, public: bool, asks: bool) -> Target | None:
    """The target of the result of ``namex patch``, before any checkpoint is read; None without a push.

    Args:
        asks: whether to check access with the Hub.

    Raises:
        PublishError: a wrong name of a repository, no access, or ``public`` without a repository.
    """
    if repo is None:
        if public:
            raise PublishError("--public belongs to --push-to-hub REPO, which is missing")
        return None
    check_repo(repo)
    if asks:
        check_access(repo)
    return Target(repo, public)


def publish(folder: Path, target: Target, quiet: bool) -> None:
    """Check a folder and push it, for ``namex-patch --push-to-hub``.

    Raises:
        PublishError, CheckpointError: as of `check_folder` and `push`.
    """
    checked = check_folder(folder)
    selection = select(checked.checkpoint, tensors=checked.left_out)
    if not quiet:
        show(Console(stderr=True), checked, selection, target)
    send(selection, checked.card, target, quiet)


def send(selection: Selection, card: str, target: Target, quiet: bool) -> None:
    """Push, and print the address."""
    if quiet or not sys.stderr.isatty():
        disable_progress_bars()
    print(printable(push(selection, card, target)))


def show(console: Console, checked: CheckedFolder, selection: Selection, target: Target) -> None:
    """Print every file with its size, the files that stay with their reasons, and the checks."""
    console.print(f"to {marked(target.repo)}, {'public' if target.public else 'private'}", soft_wrap=True)
    sizes = selection.sizes
    table = Table(["goes up", "bytes"], [[name, f"{size:,}"] for name, size in sizes.items()]).screen()
    table.add_section()
    table.add_row(f"{len(sizes)} files", size_text(sum(sizes.values())))
    console.print(table)
    for name, reason in summarised(selection.left_out).items():
        console.print(f"stays: {marked(name)}: {marked(reason)}", soft_wrap=True)
    for note in checked.notes:
        console.print(f"note: {marked(note)}", soft_wrap=True)
    ran = "it runs" if checked.ran else "every tensor's name and shape fits its class"
    console.print(f"checked: whole, its code is there, {ran}, metadata of the card", soft_wrap=True)
