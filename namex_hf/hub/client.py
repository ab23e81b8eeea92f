"""The Hub's client for a push, with errors in a line that no token can get into."""

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
"""In what the Hub says where the token is at fault."""
OF_QUOTAS = re.compile(r"quota|storage|limit|full|exceed|billing|payment|upgrade", re.I)
AGAIN = "the same command goes on from there"
"""Said where a later try may succeed."""
LATER = (408, 409, 412, 425, 429)


def check_repo(repo: str) -> None:
    """Raises:
    PublishError: not of the form USER/NAME.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError:
        well = False
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
    try:
        with hub_client():
            yield HfApi(token=token, library_name="namex_hf")
    except PublishError:
        raise
    except Exception as error:  # the client has no base of its own for errors, and wraps some of them
        raise PublishError(_failed(error, repo)) from None


def _failed(error: BaseException, repo: str) -> str:
    """What went wrong, from the first error of a chain that says more than that something did."""
    root = root_of(error)
    place = "" if str(error) in str(root) else f" ({error})"
    if isinstance(root, HfHubHTTPError):
        return _answered(root, repo) + place
    if isinstance(root, NoHubError):
        return f"{repo} cannot be pushed to: {root}{place}"
    if isinstance(root, UNREACHABLE):
        return f"the Hub cannot be reached ({type(root).__name__}: {root}); no network? The same command goes on{place}"
    return f"{repo} cannot be pushed to ({why(error)})"


def _answered(error: HfHubHTTPError, repo: str) -> str:
    status, said = error.response.status_code, answer_of(error)
    if status == 401:
        return f"the Hub refuses the token, or {repo} is none of its repositories ({said}); {NEEDED}"
    if status == 403 and OF_TOKENS.search(said) and not OF_QUOTAS.search(said):
        return f"the token may not write to {repo} ({said}); {NEEDED}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no such branch ({said})"
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo} does not exist, or the token may not see it ({said})"
    if status >= 500:
        return f"the Hub failed with {said} while {repo} was pushed; {AGAIN}"
    return f"the Hub refused the push to {repo}: {said}" + (f"; {AGAIN}" if status in LATER else "")
