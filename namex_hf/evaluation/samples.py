"""A score taken apart into its items, so that two models can be compared on the same ones."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SAMPLES, RESULTS = "samples_{}.jsonl", "results.json"


class ScoreItems(NamedTuple):
    """What a score is the mean of."""

    hashes: tuple[str, ...]
    """Of the documents, in order."""
    values: tuple[float, ...]


def members(results: Mapping[str, Any], name: str) -> list[str]:
    """The tasks below a task or group."""
    children = results["group_subtasks"].get(name, [])
    return [task for child in children for task in members(results, child)] or [name]


def metrics(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Metric and filter of every number of a task's results."""
    pairs = [key.split(",", 1) for key, value in values.items() if "," in key and isinstance(value, float)]
    return [(metric, keep) for metric, keep in pairs if not metric.endswith("_stderr")]


def shots_of(results: Mapping[str, Any], name: str) -> int | None:
    """Worked examples of a task; None of a group whose tasks have different numbers."""
    numbers = {results["n-shot"].get(task) or 0 for task in members(results, name)}
    return numbers.pop() if len(numbers) == 1 else None


def items(folder: Path, results: Mapping[str, Any], name: str, metric: str, keep: str) -> ScoreItems | None:
    """The items whose mean the score is, read from the samples' files; None for a score that is no mean of items.

    Args:
        folder: of the samples.
        results: of the same run.
        name: a task or group.
        keep: the filter, such as ``strict-match``; ``none``.
    """
    chosen = [
        sample
        for task in members(results, name)
        for sample in read_samples(folder / SAMPLES.format(task))
        if sample["filter"] == keep
    ]
    if not chosen or metric not in chosen[0]:
        return None
    values = _values(metric, [sample[metric] for sample in chosen])
    score = results["results"][name][f"{metric},{keep}"]
    if values is None or not math.isclose(sum(values) / len(values), score, rel_tol=1e-9, abs_tol=1e-12):
        return None  # such as a mean of tasks' means
    return ScoreItems(tuple(sample["doc_hash"] for sample in chosen), values)


def _values(metric: str, items: Sequence[Any]) -> tuple[float, ...] | None:
    if all(isinstance(value, (int, float)) for value in items):
        return tuple(map(float, items))
    if metric == "bits_per_byte":
        # lm-eval divides sums: each item's share, scaled so that the shares' mean is the score.
        total = sum(size for _, size in items) / len(items)
        return tuple(-log_likelihood / math.log(2) / total for log_likelihood, _ in items)
    return None


def read_samples(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
