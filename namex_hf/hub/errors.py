"""What goes wrong with a push."""

from ..errors import NamexError


class PublishError(NamexError):
    """A folder that must not go up as it is, a repository that cannot be written to, or a Hub that does not answer."""
