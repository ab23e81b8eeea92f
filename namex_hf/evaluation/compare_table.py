"""The tables of a comparison as titles and cells of text, and ``comparison.md``."""

from .compare import ORIGINAL, Comparison
from .rows import Row, perplexities
from .statistics import RESAMPLES, Estimate
from .table import Table

UNMERGED = "same router, unmerged"


def quality(found: Comparison) -> Table:
    """What each model is worth: the original in perplexities, then ratios to it."""
    names, asked = list(found.plan.settings.texts), found.original["right"] is not None
    titles = ["recipe", "experts", "mean (95 %)", "worst"]
    titles += ["exact, %", "to the original (95 %)"] if asked else []
    close = found.plan.settings.closeness
    titles += ["accepted, %", "KL, nats"] if close else []
    unmerged = any(row.unmerged for row in found.rows)
    titles += [UNMERGED, "mean to it (95 %)", *(["exact to it (95 %)"] if asked else [])] if unmerged else []
    absolute = perplexities(found.original)
    rows = [["original, perplexity", "", f"{absolute['mean']:.2f}", *[""] * (len(titles) - 3)]]
    for row in found.rows:
        cells = [row.title, str(row.experts), _mean_ratio(row), _worst(row)]
        cells += [_exact(row), _difference(row)] if asked else []
        cells += [_closeness(row, "acceptance", 100, ".1f"), _closeness(row, "divergence", 1, ".4f")] if close else []
        rows.append([*cells, *_to_unmerged(row, asked)] if unmerged else cells)
    by_domain = [[f"{absolute[name]:.2f}" for name in names]]
    by_domain += [[_ratio(row, name) for name in names] for row in found.rows]
    return Table([*titles, *names], [[*cells, *more] for cells, more in zip(rows, by_domain, strict=True)])


def _to_unmerged(row: Row, asked: bool) -> list[str]:
    if row.unmerged is None:
        return [""] * (2 + asked)
    return [row.unmerged_title or "", _mean_ratio(row.unmerged), *([_difference(row.unmerged)] if asked else [])]


def answers(found: Comparison) -> Table:
    """What is measured of each model's answers, a row a kind of problem; with the difference to the original's."""
    titles = ["recipe", "experts", "kind", "problems", "right, %", "tokens", "cut off, %", "loops, %"]
    forms = {"right": (100, ".1f"), "tokens": (1, ".1f"), "cut": (100, ".1f"), "loops": (100, ".1f")}
    rows = [
        [
            *(row.title, str(row.experts), kind, str(len(found.original["answers"][kind]["right"]))),
            *(_estimate(measured[name], *form) for name, form in forms.items()),
        ]
        for row in found.rows
        for kind, measured in row.answers.items()
    ]
    return Table(titles, rows)


def _estimate(one: Estimate, unit: int, form: str) -> str:
    shown = format(unit * one.value, form)
    if one.difference is None:
        return shown
    error = "" if one.stderr is None else f" ± {unit * one.stderr:{form}}"
    return f"{shown} ({unit * one.difference:+{form}}{error})"


def costs(found: Comparison) -> Table:
    """What each model takes, and what the patching took."""
    titles = ["recipe", "experts", "MB", "active, M", "prefill, tokens/s", "decode, tokens/s", "memory, MB"]
    titles += ["patch, s", "peak, MB"]
    rows = [
        [
            row.title,
            str(row.experts),
            _in(row, "bytes", 1e6, ".2f"),
            _in(row, "active", 1e6, ".2f"),
            _in(row, "prefill", 1, ".0f"),
            _in(row, "decode", 1, ".0f"),
            _in(row, "memory", 1e6, ".0f"),
            _in(row, "seconds", 1, ".1f"),
            _in(row, "peak_resident_bytes", 1e6, ".0f"),
        ]
        for row in found.rows
    ]
    return Table(titles, rows)


def _in(row: Row, name: str, unit: float, form: str) -> str:
    value = row.costs[name]
    return "" if value is None else format(value / unit, form)


def _ratio(row: Row, name: str) -> str:
    spread = f" ± {row.spread[name]:.3f}" if row.spread else ""
    return f"{row.ratios[name]:.3f}{spread}"


def _mean_ratio(row: Row) -> str:
    if row.spread:
        return f"{row.ratio:.3f} ± {row.spread['ratio']:.3f}"
    return f"{row.ratio:.3f}" + (f" ({row.interval[0]:.3f} to {row.interval[1]:.3f})" if row.interval else "")


def _worst(row: Row) -> str:
    domain, ratio = row.worst
    return "" if row.label == ORIGINAL else f"{ratio:.3f} {domain}"


def _closeness(row: Row, name: str, unit: int, form: str) -> str:
    if row.closeness is None:
        return ""
    error = row.spread[name] if row.spread else row.closeness[name].stderr
    value = format(unit * row.closeness[name].value, form)
    return value if error is None else f"{value} ± {unit * error:{form}}"


def _exact(row: Row) -> str:
    assert row.exact is not None
    spread = f" ± {100 * row.spread['exact']:.1f}" if row.spread else ""
    return f"{100 * row.exact:.1f}{spread}"


def _difference(row: Row) -> str:
    if row.difference is None:
        return ""
    low_high = row.difference_interval
    interval = f" ({100 * low_high[0]:+.1f} to {100 * low_high[1]:+.1f})" if low_high else ""
    return f"{100 * row.difference:+.1f}{interval}"


def notes(found: Comparison) -> list[str]:
    """What the columns mean, and what to beware of, a sentence or two each."""
    settings = found.plan.settings
    lines = [
        f"Perplexity on the first {settings.tokens} tokens of each text, as a ratio to the original's, and the "
        f"geometric mean of the ratios with its 95 % interval ({RESAMPLES} bootstrap samples of windows, paired with "
        "the original's).",
    ]
    if found.original["right"] is not None:
        lines.append(
            f"Exact: of {settings.problems} held-out word problems answered by generation, and the difference to the "
            "original in points, paired problem by problem."
        )
    if found.original["answers"]:
        lines.append(
            f"Answers: greedy, to problems of the seed '{settings.problem_seed}'. Tokens: the mean length. Cut off: "
            "ended by the limit of new tokens. Loops: ends in the same tokens three times or more. In brackets: the "
            "difference to the original, ± its standard error, paired problem by problem."
        )
    if settings.closeness:
        lines.append(
            "Accepted: the sum over the vocabulary of min(p, q), mean over all scored tokens; KL: KL(p || q). p is the "
            "original's distribution of the next token, q the model's. ± is the standard error over windows."
        )
    if any(row.unmerged for row in found.rows):
        lines.append(
            f"{UNMERGED[0].upper()}{UNMERGED[1:]}: the row of the same cosine or StableMoE router with `method: smoe`. "
            "Against it only the merge counts, against the original the change of router too."
        )
    if any(row.seeds for row in found.rows):
        lines.append("Mean of n seeds: the mean over seeds of calibration text, ± the standard deviation over seeds.")
    lines.append(
        "Active: parameters a token passes through, embeddings included: all but routed experts beyond its top-k "
        "(soft: one merged expert a layer). Tokens a second: prefill of 8 prompts and greedy decoding of the 8 "
        f"together, float32 on {settings.device}. Memory: the most while the model is loaded and "
        "scored. Patching: its seconds, and the peak resident memory of its process, the libraries' own included."
    )
    return [*lines, *_warnings(found)]


def _warnings(found: Comparison) -> list[str]:
    lines = []
    if len({(one["threads"], one["at_once"]) for one in found.results.values()}) > 1:
        lines.append("Times are not comparable: rows were measured with different numbers of threads or --jobs.")
    elif any(one["at_once"] > 1 for one in found.results.values()):
        at_once = max(one["at_once"] for one in found.results.values())
        lines.append(f"Times are not comparable: {at_once} models were measured side by side.")
    lines += [
        f"The same recipe as {first}, measured once: {label}."
        for label, first in found.plan.same.items()
        if label != first
    ]
    return lines + [f"Failed: {label}: {reason}." for label, reason in found.failed.items()]


def markdown(found: Comparison) -> str:
    """``comparison.md``: the tables, what they mean, and with what they were made."""
    run = found.plan.run
    lines = [f"# Recipes on `{found.plan.checkpoint.name}`, side by side", ""]
    for table in (quality(found), costs(found), *([answers(found)] if found.original["answers"] else [])):
        lines += [*table.markdown(numbers=True), ""]
    lines += [f"* {note}" for note in notes(found)]
    lines += ["", ", ".join(f"{library} {version}" for library, version in run["versions"].items()) + "."]
    return "\n".join(lines) + "\n"
