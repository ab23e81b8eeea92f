"""What goes wrong for reasons a user can mend.

Every message names the file, tensor or field, what was found and what is accepted, in one line that can be printed.
"""

from .printable import printable


class NamexError(Exception):
    """Base of all errors of this package; the commands print it in one line and exit with status 2."""

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(message))


class UsageError(NamexError):
    """An option, or a keyword argument, with a value that it cannot have, or options that do not go together."""


class RecipeError(NamexError):
    """A field or value that a recipe cannot have, or choices that mean nothing together.

    Args:
        fields: of a recipe, which mean nothing together.
    """

    def __init__(self, message: object = "", fields: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.fields = fields


class FamilyError(NamexError):
    """A model family that is not supported, or a configuration that contradicts itself."""


class CheckpointError(NamexError):
    """A checkpoint that is incomplete, damaged, or not what its configuration says."""


class OutputError(NamexError):
    """An output folder that cannot be used, or too little room for it."""


class CalibrationError(NamexError):
    """Calibration data that cannot be found or read, or too little of it."""


class TrainingError(NamexError):
    """A training run that cannot start, or data that it cannot read."""


class PublishError(NamexError):
    """A folder that must not go up as it is, a repository that cannot be written to, or a Hub that does not answer."""


class TaskError(NamexError):
    """A task that is not known, whose data cannot be had, or a text that cannot be scored."""


class MissingExtraError(NamexError):
    """A choice that needs packages which are not installed; the message names the extra that brings them."""

    def __init__(self, what: str, extra: str):
        super().__init__(f"{what} needs packages of an extra: {install(extra)}")
        self.extra = extra


def install(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'namex-hf[{extra}]', in a clone pip install '.[{extra}]'"
