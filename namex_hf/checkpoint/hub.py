"""The Hub's client without a log of its own, and what the Hub said when something went wrong."""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session, hf_raise_for_status, parse_ratelimit_headers

UNREACHABLE = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)
"""OSError, and the HTTPError of whichever httpx the client is built on."""
CONFLICTS = 20
"""Answers of status 409, which the client repeats for ever where it makes a repository."""
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
        NoHubError: a web page, or another text, in the place of an answer.
    """
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    session, answers = get_session(), _Answers()
    before = session.event_hooks
    session.event_hooks = {**before, "response": [*before["response"], answers.check]}
    try:
        yield
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise answers.unread(error) from error
    finally:
        session.event_hooks = before
        logger.setLevel(level)


class _Answers:
    """Looks at every response of httpx before the client does."""

    def __init__(self) -> None:
        self.response: Any = None
        self.conflicts = 0

    def unread(self, error: Exception) -> Exception:
        """What the last answer said that the client could not read."""
        if self.response is None:
            return error
        try:
            hf_raise_for_status(self.response)
            said = _text(self.response)
        except HfHubHTTPError as refused:
            return refused
        what = f"{self.response.status_code} with {said!r}" if said else f"{self.response.status_code} with nothing"
        return NoHubError(f"{_address(self.response)} answered {what}, which no Hub does")

    def check(self, response: Any) -> None:
        self.response = response
        self.conflicts += response.status_code == 409
        later = response.status_code in (429, 503) and _wait(response.headers) > LONGEST_WAIT
        if later or self.conflicts > CONFLICTS:
            response.read()
            hf_raise_for_status(response)
        page = "html" in response.headers.get("Content-Type", "").lower()
        if page and response.is_success and "/resolve/" not in response.request.url.path:
            where = _address(response)
            raise NoHubError(f"{where} answered with a web page: a captive portal, a proxy, or a wrong HF_ENDPOINT?")


def _address(response: Any) -> str:
    return str(response.request.url.copy_with(query=None))


def _wait(headers: Any) -> int:
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds
    after = headers.get("Retry-After", "").strip()
    return int(after[:9]) if after.isdecimal() else 0


def root_of(error: BaseException) -> BaseException:
    """The error of a chain that says most: the Hub's own answer, else the first failure of the network or the disk."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    answers = [one for one in chain if isinstance(one, (HfHubHTTPError, NoHubError))]
    failures = [one for one in chain if isinstance(one, UNREACHABLE)]
    return [*answers[:1], *reversed(failures), *reversed(chain)][0]


def answer_of(error: HfHubHTTPError) -> str:
    """Status and words of the Hub's answer, with how long it asks to wait."""
    response = error.response
    said = " ".join((error.server_message or "").split()) or _text(response) or response.reason_phrase
    wait = _wait(response.headers)
    where = "" if re.search(r"/api/|/resolve/|\.git/", response.request.url.path) else f" at {_address(response)}"
    return f"{response.status_code} {said}{where}" + (f"; it asks to wait for {wait} seconds" if wait else "")


def _text(response: Any) -> str:
    """The beginning of what a response says, without tags."""
    try:
        text = response.text
    except Exception:  # not read to its end, or of no known encoding
        return ""
    try:
        text = str(json.loads(text)["message"])  # as servers of large files have it
    except (ValueError, KeyError, TypeError, RecursionError):
        text = re.sub(r"<[^>]*>", " ", text[:10_000])
    return " ".join(text.split())[:300]


def why(error: BaseException) -> str:
    """What went wrong with the Hub, as the end of a sentence about what cannot be fetched or pushed."""
    root = root_of(error)
    if isinstance(root, HfHubHTTPError):
        return f"the Hub answered {answer_of(root)}"
    if isinstance(root, NoHubError):
        return str(root)
    return f"{type(root).__name__}: {root}"
