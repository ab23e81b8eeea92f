"""Text that came from outside (names of files, keys, templates, what a server said), made fit to be printed."""

import difflib
import unicodedata
from collections.abc import Iterable

from .scrub import scrubbed

LONGEST = 1000
HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories of what a terminal obeys, or does not show."""


def printable(text: object, longest: int = LONGEST) -> str:
    """One line of at most ``longest`` characters.

    White space becomes single spaces. Control characters, marks that turn the direction of writing and half surrogate
    pairs become escapes, so that no terminal obeys them. A text that is too long loses its middle. Tokens and passwords
    become three stars.
    """
    whole = str(text)
    if len(whole) > 8 * longest:  # what is cut away need not be looked at
        whole = whole[: 4 * longest] + whole[-4 * longest :]
    line = "".join(_escaped(letter) for letter in " ".join(scrubbed(whole).split()))
    if len(line) <= longest:
        return line
    end = longest // 4
    return f"{line[: longest - end - 5]} ... {line[-end:]}"


def marked(text: object, longest: int = LONGEST) -> str:
    """`printable`, for what rich prints: square brackets stay what they are."""
    from rich.markup import escape  # rich is not imported where nothing is printed by it

    return escape(printable(text, longest))


def did_you_mean(word: object, accepted: Iterable[str]) -> str:
    """The end of a message about an unknown word: what it resembles most of what is accepted, or nothing."""
    nearest = difflib.get_close_matches(str(word), list(accepted), 1)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode() if unicodedata.category(letter) in HIDDEN else letter
