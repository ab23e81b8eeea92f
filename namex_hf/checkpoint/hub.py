"""The Hub's client without a log of its own, and what the Hub said when something went wrong."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
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
    except (JSONDecodeError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise NoHubError(f"{answers.last} cannot be read ({type(error).__name__}: {error})") from error
    finally:
        session.event_hooks = before
        logger.setLevel(level)


class _Answers:
    """Looks at every response of httpx before the client does."""

    def __init__(self) -> None:
        self.response: Any = None
        self.conflicts = 0

    @property
    def last(self) -> str:
        """The last answer in words."""
        if self.response is None:
            return "the Hub's answer"
        try:
            said = " ".join(self.response.text.split())[:200]
        except Exception:  # not read to its end, or of no known encoding
            said = ""
        return f"the answer of {_address(self.response)}, {self.response.status_code} '{said}',"

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
    """The first error of a chain, which says most: the Hub's own answer, where there is one."""
    while (
        not isinstance(error, (HfHubHTTPError, NoHubError))
        and (cause := error.__cause__ or error.__context__) is not None
    ):
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
    return f"{type(root).__name__}: {root}"
