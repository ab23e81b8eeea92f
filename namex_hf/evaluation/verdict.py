"""What a run made of a model, in words: how much smaller it is, what that costs, and which command does better."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..checkpoint.source import Checkpoint
from ..files import size_text
from ..record import Report, ratio
from .arithmetic import exact_answers, held_out_problems
from .loading import load, tokenizer_of
from .size import size_of
from .statistics import SHARE, difference

BATCH = 100  # problems answered together


def answers_before_and_after(before: Path, after: Path) -> dict[str, float]:
    """How many of the packaged problems the original and the result answer.

    Returns:
        ``problems``, ``before``, ``after``: counts; ``value``, ``low``, ``high``: the difference in points, with a 95 %
        interval over problems.

    Memory: one of the models at a time.
    """
    tokenizer, problems = tokenizer_of(before), held_out_problems()
    old, new = ([float(one) for one in exact_answers(load(f), tokenizer, problems, BATCH)] for f in (before, after))
    counts = {"problems": len(problems), "before": int(sum(old)), "after": int(sum(new))}
    return counts | difference(SHARE, [new], [old])


def verdict(report: Report, original: Checkpoint, result: Checkpoint) -> Iterator[str]:
    """Sentences, the size first."""
    old, new = size_of(original), size_of(result)
    yield (
        f"{size_text(old.bytes)} became {size_text(new.bytes)}; a token passes through {new.active / old.active:.0%} "
        "of the parameters that it passed through before."
    )
    if report.perplexity:
        yield f"Perplexity is {ratio(report.perplexity['mean']):.3f} times the original's."
    if answers := report.answers:
        yield (
            f"It answers {answers['after']:.0f} of {answers['problems']:.0f} word problems exactly, the original "
            f"{answers['before']:.0f}: {answers['value']:+.1f} points (95 % interval {answers['low']:+.1f} to "
            f"{answers['high']:+.1f})."
        )
    if hint := better(report.run["recipe"]):
        yield hint


def better(recipe: dict[str, Any]) -> str | None:
    """A command that loses less at the same size, as far as measured (docs/merging.md)."""
    if recipe["merge"] == "grouped":
        return "Fewer experts lose more than narrower ones of the same size: --keep SHARE in place of --merge grouped."
    if recipe["merge"] == "narrow" and recipe["fit"] == "none":
        return "A fit of whole layers loses less, in more time and with enough text: --fit layer."
    return None
