"""What a run made of a model, in words: how much smaller it is, what that costs, and which command does better."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..checkpoint.source import Checkpoint
from ..files import size_text
from ..record import Report, ratio
from .generation import generated_answers
from .loading import load, tokenizer_of
from .problems import packaged
from .size import size_of
from .statistics import SHARE, difference

PROBLEMS, BATCH = 200, 100  # that are answered, and answered together
SHOWN = 2  # answers that are shown
MOST_TOKENS = 262_144
"""Of text, up to which it was seen that a fit loses less by more of it (docs/merging.md, How much text)."""


def answers_before_and_after(before: Path, after: Path) -> dict[str, Any]:
    """How many of the packaged problems the original and the result answer.

    Returns:
        ``problems``, ``before``, ``after``: counts; ``value``, ``low``, ``high``: the difference in points, with a 95 %
        interval over problems; ``examples``: the first ``prompt``s, each with the answer ``before`` and ``after``.

    Memory: one of the models at a time.
    """
    tokenizer, problems = tokenizer_of(before), packaged.make(0, PROBLEMS)
    prompts = [problem.prompt for problem in problems]
    old, new = (generated_answers(load(f), tokenizer, prompts, packaged.NEW_TOKENS, BATCH) for f in (before, after))
    scores = [
        [float(packaged.check(one.text, problem)) for one, problem in zip(answers, problems, strict=True)]
        for answers in (old, new)
    ]
    counts = {"problems": len(problems), "before": int(sum(scores[0])), "after": int(sum(scores[1]))}
    shown = zip(prompts[:SHOWN], old, new, strict=False)
    examples = [{"prompt": prompt, "before": own.text, "after": other.text} for prompt, own, other in shown]
    return counts | difference(SHARE, [scores[1]], [scores[0]]) | {"examples": examples}


def verdict(report: Report, original: Checkpoint, result: Checkpoint) -> Iterator[str]:
    """Lines, the size first, then what it costs, and two answers of both."""
    old, new = size_of(original), size_of(result)
    yield (
        f"{size_text(old.bytes)} became {size_text(new.bytes)}; a token passes through {new.active / old.active:.0%} "
        "of the parameters that it passed through before."
    )
    if report.perplexity:
        yield f"Perplexity is {ratio(report.perplexity['mean']):.3f} times the original's."
    if answers := report.answers:
        yield (
            f"It answers {answers['after']} of {answers['problems']} word problems exactly, the original "
            f"{answers['before']}: {answers['value']:+.1f} points (95 % interval {answers['low']:+.1f} to "
            f"{answers['high']:+.1f})."
        )
        for one in answers["examples"]:
            yield from (one["prompt"], f"original: {_line(one['before'])}", f"result: {_line(one['after'])}")
    if hint := better(report.run):
        yield hint


def better(run: dict[str, Any]) -> str | None:
    """A command that loses less at the same size, as far as measured (docs/merging.md)."""
    recipe, text = run["recipe"], run.get("calibration")
    if recipe["merge"] == "grouped":
        return "Fewer experts lose more than narrower ones of the same size: --keep SHARE in place of --merge grouped."
    if recipe["merge"] == "narrow" and recipe["fit"] == "none":
        return "A fit of whole layers loses less, in more time and with enough text: --fit layer."
    if recipe["merge"] == "narrow" and text and text["tokens"] < MOST_TOKENS:
        return (
            f"More text loses less, where there is more: --calibration-tokens {min(4 * text['tokens'], MOST_TOKENS)}."
        )
    return None


def _line(text: str) -> str:
    return " ".join(text.split())
