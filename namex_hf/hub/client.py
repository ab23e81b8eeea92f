"""The Hub's client for a push. Its errors become a line that never contains a token."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..checkpoint.hub import UNREACHABLE, NoHubError, answer_of, hub_client, root_of, why
from ..errors import PublishError

NEEDED = "set HF_TOKEN or run 'hf auth login', with a token that may write"
OF_TOKENS = re.compile(
    r"token|permission|rights|namespace|write access|authori[sz]|credential|create_pr|forbidden", re.I
)
"""Words in the Hub's message if the token is the reason of a refusal."""
OF_QUOTAS = re.compile(r"quota|storage|limit|full|exceed|billing|payment|upgrade", re.I)
AGAIN = "the same command goes on from there"
"""End of a message if a later attempt may succeed."""
LATER = (408, 409, 412, 425, 429)
"""Status codes after which a later attempt may succeed."""


def check_repo(repo: str) -> None:
    """Raises:
    PublishError: `repo` is not of the form USER/NAME.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError:
        is_valid = False
    else:
        is_valid = repo.count("/") == 1
    if not is_valid:
        raise PublishError(f"{repo!r} is no repository; accepted: USER/NAME, of letters, digits, '-', '_' and '.'")


@contextmanager
def client(repo: str) -> Iterator[HfApi]:
    """The client, with the token of the environment or of the stored login. Its errors become a `PublishError`.

    The client logs nothing meanwhile: requests that it repeats in vain end in a single line.

    Raises:
        PublishError: no token or a refused token, no such repository or branch, no network, or a failing server.
    """
    token = get_token()
    if token is None:
        raise PublishError(f"no token for {repo}; {NEEDED}")
    try:
        with hub_client():
            yield HfApi(token=token, library_name="namex_hf")
    except PublishError:
        raise
    except Exception as error:  # the client's errors have no common base class, and wrap others
        raise PublishError(_failed(error, repo)) from None


def _failed(error: BaseException, repo: str) -> str:
    """The error message, from the most useful error of a chain."""
    root = root_of(error)
    place = "" if str(error) in str(root) else f" ({error})"
    if isinstance(root, HfHubHTTPError):
        return _response_error(root, repo) + place
    if isinstance(root, NoHubError):
        return f"{repo} cannot be pushed to: {root}{place}"
    if isinstance(root, UNREACHABLE):
        return f"the Hub cannot be reached ({type(root).__name__}: {root}); no network? The same command goes on{place}"
    return f"{repo} cannot be pushed to ({why(error)})"


def _response_error(error: HfHubHTTPError, repo: str) -> str:
    status, message = error.response.status_code, answer_of(error)
    if status == 401:
        return f"the Hub refuses the token, or {repo} is none of its repositories ({message}); {NEEDED}"
    if status == 403 and OF_TOKENS.search(message) and not OF_QUOTAS.search(message):
        return f"the token may not write to {repo} ({message}); {NEEDED}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no such branch ({message})"
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo} does not exist, or the token may not see it ({message})"
    if status >= 500:
        return f"the Hub failed with {message} while {repo} was pushed; {AGAIN}"
    return f"the Hub refused the push to {repo}: {message}" + (f"; {AGAIN}" if status in LATER else "")
