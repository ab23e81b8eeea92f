"""What goes wrong with a task."""

from ..errors import NamexError


class TaskError(NamexError):
    """A task that is not known, whose data cannot be had, or a text that cannot be scored."""
