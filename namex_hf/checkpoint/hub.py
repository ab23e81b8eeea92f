"""The Hub's client without its own log, and the reason of a failure in words."""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session, hf_raise_for_status, parse_ratelimit_headers

UNREACHABLE = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)
"""OSError, and the HTTPError of the httpx version that the client uses."""
CONFLICTS = 20
"""Most responses of status 409: the client that creates a repository would repeat its request for ever."""
LONGEST_WAIT = 60
"""Most seconds that a Hub may ask the client to wait; the client itself would wait for hours, silently."""


class NoHubError(OSError):
    """A response that does not come from a Hub, but from a proxy, a captive portal, or another server."""


@contextmanager
def hub_client() -> Iterator[None]:
    """Inside this context the client logs nothing, waits at most `LONGEST_WAIT`, and refuses web pages as responses.
    Requests that it repeats in vain end in a single error.

    Raises:
        HfHubHTTPError: the Hub refuses a request, or asks for a longer wait.
        NoHubError: the response is a web page, or another text that no Hub sends.
    """
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    session, responses = get_session(), _Responses()
    before = session.event_hooks
    session.event_hooks = {**before, "response": [*before["response"], responses.check]}
    try:
        yield
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise responses.explain(error) from error
    finally:
        session.event_hooks = before
        logger.setLevel(level)


class _Responses:
    """Checks every response of httpx before the client reads it."""

    def __init__(self) -> None:
        self.response: Any = None
        self.conflicts = 0

    def explain(self, error: Exception) -> Exception:
        """The error to raise after `error`, by which the client failed to read the last response."""
        if self.response is None:
            return error
        try:
            hf_raise_for_status(self.response)
            text = _text(self.response)
        except HfHubHTTPError as refusal:
            return refusal
        content = f"{self.response.status_code} with {text!r}" if text else f"{self.response.status_code} with nothing"
        return NoHubError(f"{_address(self.response)} answered {content}, which no Hub does")

    def check(self, response: Any) -> None:
        self.response = response
        self.conflicts += response.status_code == 409
        too_long = response.status_code in (429, 503) and _wait(response.headers) > LONGEST_WAIT
        if too_long or self.conflicts > CONFLICTS:
            response.read()
            hf_raise_for_status(response)
        is_page = "html" in response.headers.get("Content-Type", "").lower()
        if is_page and response.is_success and "/resolve/" not in response.request.url.path:
            address = _address(response)
            raise NoHubError(f"{address} answered with a web page: a captive portal, a proxy, or a wrong HF_ENDPOINT?")


def _address(response: Any) -> str:
    return str(response.request.url.copy_with(query=None))


def _wait(headers: Any) -> int:
    """Seconds that the Hub asks to wait; 0 without such a request."""
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds
    after = headers.get("Retry-After", "").strip()
    return int(after[:9]) if after.isdecimal() else 0


def root_of(error: BaseException) -> BaseException:
    """The most useful error of a chain: the Hub's own response, else the first failure of the network or the disk."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    responses = [link for link in chain if isinstance(link, (HfHubHTTPError, NoHubError))]
    failures = [link for link in chain if isinstance(link, UNREACHABLE)]
    return [*responses[:1], *reversed(failures), *reversed(chain)][0]


def answer_of(error: HfHubHTTPError) -> str:
    """Status and message of the Hub's response, with the seconds that it asks to wait."""
    response = error.response
    message = " ".join((error.server_message or "").split()) or _text(response) or response.reason_phrase
    wait = _wait(response.headers)
    place = "" if re.search(r"/api/|/resolve/|\.git/", response.request.url.path) else f" at {_address(response)}"
    return f"{response.status_code} {message}{place}" + (f"; it asks to wait for {wait} seconds" if wait else "")


def _text(response: Any) -> str:
    """The first 300 characters of a response's text, without tags."""
    try:
        text = response.text
    except Exception:  # the body is incomplete, or its encoding is unknown
        return ""
    try:
        text = str(json.loads(text)["message"])  # the form of servers for large files
    except (ValueError, KeyError, TypeError, RecursionError):
        text = re.sub(r"<[^>]*>", " ", text[:10_000])
    return " ".join(text.split())[:300]


def why(error: BaseException) -> str:
    """The reason of a failure with the Hub, to end a message that names the model or folder."""
    root = root_of(error)
    if isinstance(root, HfHubHTTPError):
        return f"the Hub answered {answer_of(root)}"
    if isinstance(root, NoHubError):
        return str(root)
    return f"{type(root).__name__}: {root}"
