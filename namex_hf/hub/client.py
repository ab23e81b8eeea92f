"""The Hub's client, with errors in a line that no token can get into."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from .errors import PublishError

TOKEN = re.compile(r"\b(?:hf|api)_[A-Za-z0-9]{8,}|\b(?:Bearer|Basic) [A-Za-z0-9._~+/=-]+")
UNREACHABLE = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)
"""OSError, and the HTTPError of whichever httpx the client is built on."""
NEEDED = "set HF_TOKEN or run 'hf auth login', with a token that may write"


def scrubbed(text: object, token: str | None) -> str:
    """One line without `token` or anything that looks like one."""
    said = str(text)
    if token:
        said = said.replace(token, "***")
    return " ".join(TOKEN.sub("***", said).split())


def check_repo(repo: str) -> None:
    """Raises:
    PublishError: not of the form USER/NAME.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError:
        repo, well = scrubbed(repo, get_token()), False
    else:
        well = repo.count("/") == 1
    if not well:
        raise PublishError(f"{repo!r} is no repository; accepted: USER/NAME, of letters, digits, '-', '_' and '.'")


@contextmanager
def client(repo: str) -> Iterator[HfApi]:
    """The client, by the token of the environment or the stored login; what it raises comes as a `PublishError`.

    Its own log is silent meanwhile: what it retries and gives up is told in the end, in a line.

    Raises:
        PublishError: no token, one that is refused, no such repository or branch, no network, a server's failure.
    """
    token = get_token()
    if token is None:
        raise PublishError(f"no token for {repo}; {NEEDED}")
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield HfApi(token=token, library_name="namex_hf")
    except PublishError:
        raise
    except Exception as error:  # the client has no base of its own for errors, and wraps some of them
        raise PublishError(scrubbed(_said(error, repo), token)) from None
    finally:
        logger.setLevel(level)


def _said(error: BaseException, repo: str) -> str:
    """What went wrong, from the first error of a chain that says more than that something did."""
    root: BaseException = error
    while not isinstance(root, HfHubHTTPError) and (root.__cause__ or root.__context__) is not None:
        root = cast(BaseException, root.__cause__ or root.__context__)
    place = "" if str(error) in str(root) else f" ({error})"
    if isinstance(root, HfHubHTTPError):
        return _answered(root, repo) + place
    if isinstance(root, UNREACHABLE):
        return f"the Hub cannot be reached ({type(root).__name__}: {root}); no network? The same command goes on{place}"
    return f"{repo} cannot be pushed to ({type(error).__name__}: {error})"


def _answered(error: HfHubHTTPError, repo: str) -> str:
    status = error.response.status_code
    if status == 401:
        return f"the Hub refuses the token, or {repo} is none of its repositories; {NEEDED}"
    if status == 403:
        return f"the token may not write to {repo}; {NEEDED}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no such branch"
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo} does not exist, or the token may not see it"
    if status >= 500:
        return f"the Hub failed with {status} while {repo} was pushed; the same command goes on from there"
    return f"the Hub refused the push to {repo}: {status} {error.server_message or error}"
