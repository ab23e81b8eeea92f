"""Rows of a data set of the Hub, streamed by the ``datasets`` library."""

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from huggingface_hub import dataset_info
from huggingface_hub.errors import RepositoryNotFoundError

from ..checkpoint.hub import hub_client
from ..errors import CalibrationError, MissingExtraError

FORM = "OWNER/NAME[:CONFIG[:SPLIT]]"
NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::([^:]*))?(?::([^:]+))?")


def is_hub_name(source: str) -> bool:
    return NAME.fullmatch(source) is not None


def hub_rows(source: str, seed: int) -> tuple[str, Iterator[dict[str, Any]]]:
    """``source`` with its commit, and its rows: shards in random order, rows from a buffer of the library's size.

    Raises:
        CalibrationError: no such data set, configuration or split, no network, or (while rows are read) damaged files.
        MissingExtraError: ``datasets`` is not installed.
    """
    match = NAME.fullmatch(source)
    assert match, source
    library = _library(source)
    with _hub_errors(source):
        with hub_client():
            commit = dataset_info(match[1]).sha
        rows = library.load_dataset(
            match[1], match[2] or None, split=match[3] or "train", revision=commit, streaming=True
        )
        return f"{source}@{commit}", _read(rows.shuffle(seed=seed), source)


def _read(rows: Any, source: str) -> Iterator[dict[str, Any]]:
    with _hub_errors(source):
        yield from rows


def _library(source: str) -> ModuleType:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise MissingExtraError(f"calibration data {source} (no file or folder, so a Hub data set)", "train") from error


@contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # what the library and the network raise is no closed set
        reason = f"{type(error).__name__}: {error}"
        if type(error) is RepositoryNotFoundError:
            reason = "there is none of that name, or a private one, which needs 'hf auth login'"
        raise CalibrationError(
            f"calibration data {source} is no file or folder, and as a Hub data set {FORM} it cannot be read: {reason}"
        ) from error
