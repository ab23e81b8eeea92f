"""Errors of a push."""

from ..errors import NamexError


class PublishError(NamexError):
    """The folder must not be pushed as it is, the repository cannot be written to, or the Hub does not respond."""
