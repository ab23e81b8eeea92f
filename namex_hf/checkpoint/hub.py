"""The Hub's client without a log of its own, and what the Hub said when something went wrong."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session, hf_raise_for_status, parse_ratelimit_headers

UNREACHABLE = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)
"""OSError, and the HTTPError of whichever httpx the client is built on."""
LONGEST_WAIT = 60
"""Seconds that a Hub may ask the client to wait; the client itself would wait for hours, without a word."""


class NoHubError(OSError):
    """An answer that no Hub gives: of a proxy, a captive portal, or another server."""


@contextmanager
def hub_client() -> Iterator[None]:
    """While it lasts, the client logs nothing, waits for no more than `LONGEST_WAIT`, and takes no web page for an
    answer. What it retries and gives up comes as one error in the end.

    Raises:
        HfHubHTTPError: also for a Hub that asks to come back later.
        NoHubError: a web page in the place of an answer.
    """
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    session = get_session()
    before = session.event_hooks
    session.event_hooks = {**before, "response": [*before["response"], _check_answer]}
    try:
        yield
    finally:
        session.event_hooks = before
        logger.setLevel(level)


def _check_answer(response: Any) -> None:
    """Args: response, of httpx."""
    if response.status_code in (429, 503) and _wait(response.headers) > LONGEST_WAIT:
        response.read()
        hf_raise_for_status(response)
    page = "html" in response.headers.get("Content-Type", "").lower()
    if page and response.is_success and "/resolve/" not in response.request.url.path:
        address = response.request.url.copy_with(query=None)
        raise NoHubError(f"{address} answered with a web page: a captive portal, a proxy, or a wrong HF_ENDPOINT?")


def _wait(headers: Any) -> int:
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds
    after = headers.get("Retry-After", "").strip()
    return int(after[:9]) if after.isdecimal() else 0


def root_of(error: BaseException) -> BaseException:
    """The first error of a chain, which says most: the Hub's own answer, where there is one."""
    while not isinstance(error, HfHubHTTPError) and (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def answer_of(error: HfHubHTTPError) -> str:
    """Status and words of the Hub's answer, with how long it asks to wait."""
    response = error.response
    said = " ".join((error.server_message or response.reason_phrase).split())
    wait = _wait(response.headers)
    return f"{response.status_code} {said}" + (f"; it asks to wait for {wait} seconds" if wait else "")


def why(error: BaseException) -> str:
    """What went wrong with the Hub, as the end of a sentence about what cannot be fetched or pushed."""
    root = root_of(error)
    if isinstance(root, HfHubHTTPError):
        return f"the Hub answered {answer_of(root)}"
    if isinstance(root, NoHubError):
        return str(root)
    if isinstance(root, UNREACHABLE):
        return f"{type(root).__name__}: {root}"
    if isinstance(root, (ValueError, KeyError, TypeError, AttributeError, AssertionError)):
        return f"{constants.ENDPOINT} gave an answer that cannot be read, {type(root).__name__}: {root}"
    return f"{type(error).__name__}: {error}"
