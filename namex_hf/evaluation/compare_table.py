"""The tables of a comparison as titles and cells of text, and ``comparison.md``."""

from .compare import ORIGINAL, Comparison
from .rows import Row, perplexities
from .statistics import RESAMPLES, Estimate
from .table import Table

UNMERGED = "same router, unmerged"
EQUAL_BYTES = (
    "Equal bytes: routed experts in so many bits, the other matrices of decoder layers in 8, and embedding, head, "
    "norms, biases and routers in 16. Scored as dequantised numbers. rtn: round to nearest; gptq: GPTQ on calibration "
    "text, layer after layer. Both: asymmetric grids over 32 inputs of a row (16, or all, where 32 does not divide). "
    "Bits a parameter: of all routed experts, scales and zeros included, over the number of the original's. MB: the "
    "whole model, by formula. Best of its bytes: no row of as many bytes or fewer is better."
)
COSTS = {
    "MB": ("bytes", 1e6, ".2f"),
    "active, M": ("active", 1e6, ".2f"),
    "prefill, tokens/s": ("prefill", 1, ".0f"),
    "decode, tokens/s": ("decode", 1, ".0f"),
    "memory, MB": ("memory", 1e6, ".0f"),
    "patch, s": ("seconds", 1, ".1f"),
    "peak, MB": ("peak_resident_bytes", 1e6, ".0f"),
}
"""Field, unit and form of a column."""


def quality(comparison: Comparison) -> Table:
    """What each model is worth: the original in perplexities, then ratios to it."""
    names, asked = list(comparison.plan.settings.texts), comparison.original["right"] is not None
    titles = ["recipe", "experts", "mean (95 %)", "worst"]
    titles += ["exact, %", "to the original (95 %)"] if asked else []
    close = comparison.plan.settings.closeness
    titles += ["accepted, %", "KL, nats"] if close else []
    unmerged = any(row.unmerged for row in comparison.rows)
    titles += [UNMERGED, "mean to it (95 %)", *(["exact to it (95 %)"] if asked else [])] if unmerged else []
    absolute = perplexities(comparison.original)
    rows = [["original, perplexity", "", f"{absolute['mean']:.2f}", *[""] * (len(titles) - 3)]]
    for row in comparison.rows:
        cells = [row.title, str(row.experts), _mean_ratio(row), _worst(row)]
        cells += [_exact(row), _difference(row)] if asked else []
        cells += [_closeness(row, "acceptance", 100, ".1f"), _closeness(row, "divergence", 1, ".4f")] if close else []
        rows.append([*cells, *_to_unmerged(row, asked)] if unmerged else cells)
    by_domain = [[f"{absolute[name]:.2f}" for name in names]]
    by_domain += [[_ratio(row, name) for name in names] for row in comparison.rows]
    return Table([*titles, *names], [[*cells, *more] for cells, more in zip(rows, by_domain, strict=True)])


def equal_bytes(comparison: Comparison) -> Table:
    """The original and the smaller models in several forms of their weights, by falling bytes."""
    asked = comparison.original["right"] is not None
    titles = ["model", "weights", "bits a parameter", "MB", "mean (95 %)", "worst"]
    titles += ["exact, %", "to the original (95 %)"] if asked else []
    rows = []
    for one in comparison.sized:
        row = one.row
        cells = [row.title, one.weights, f"{one.bits:.2f}", f"{one.bytes / 1e6:.2f}", _mean_ratio(row), _worst(row)]
        rows.append([*cells, *([_exact(row), _difference(row)] if asked else []), ", ".join(one.best)])
    return Table([*titles, "best of its bytes in"], rows)


def tables(comparison: Comparison) -> list[tuple[str, Table]]:
    """All tables of a comparison by their titles."""
    shown = [("what each model is worth", quality(comparison)), ("what each model takes", costs(comparison))]
    shown += [("how each model answers", answers(comparison))] if comparison.original["answers"] else []
    return shown + ([("equal bytes", equal_bytes(comparison))] if comparison.sized else [])


def _to_unmerged(row: Row, asked: bool) -> list[str]:
    if row.unmerged is None:
        return [""] * (2 + asked)
    return [row.unmerged_title or "", _mean_ratio(row.unmerged), *([_difference(row.unmerged)] if asked else [])]


def answers(comparison: Comparison) -> Table:
    """What is measured of each model's answers, a row a kind of problem; with the difference to the original's."""
    titles = ["recipe", "experts", "kind", "problems", "right, %", "tokens", "cut off, %", "loops, %"]
    forms = {"right": (100, ".1f"), "tokens": (1, ".1f"), "cut": (100, ".1f"), "loops": (100, ".1f")}
    rows = [
        [
            *(row.title, str(row.experts), kind, str(len(comparison.original["answers"][kind]["right"]))),
            *(_estimate(measured[name], *form) for name, form in forms.items()),
        ]
        for row in comparison.rows
        for kind, measured in row.answers.items()
    ]
    return Table(titles, rows)


def _estimate(one: Estimate, unit: int, form: str) -> str:
    shown = format(unit * one.value, form)
    if one.difference is None:
        return shown
    error = "" if one.stderr is None else f" ± {unit * one.stderr:{form}}"
    return f"{shown} ({unit * one.difference:+{form}}{error})"


def costs(comparison: Comparison) -> Table:
    """What each model takes, and what the patching took."""
    rows = [[row.title, str(row.experts), *(_cost(row, *how) for how in COSTS.values())] for row in comparison.rows]
    return Table(["recipe", "experts", *COSTS], rows)


def _cost(row: Row, name: str, unit: float, form: str) -> str:
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


def notes(comparison: Comparison) -> list[str]:
    """What the columns mean, and what to beware of, a sentence or two each."""
    settings = comparison.plan.settings
    lines = [
        f"Perplexity on the first {settings.tokens} tokens of each text, as a ratio to the original's, and the "
        f"geometric mean of the ratios with its 95 % interval ({RESAMPLES} bootstrap samples of windows, paired with "
        "the original's).",
    ]
    if comparison.original["right"] is not None:
        lines.append(
            f"Exact: of {settings.problems} held-out word problems answered by generation, and the difference to the "
            "original in points, paired problem by problem."
        )
    if comparison.original["answers"]:
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
    if any(row.unmerged for row in comparison.rows):
        lines.append(
            f"{UNMERGED[0].upper()}{UNMERGED[1:]}: the row of the same cosine or StableMoE router with `method: smoe`. "
            "Against it only the merge counts, against the original the change of router too."
        )
    if any(row.seeds for row in comparison.rows):
        lines.append("Mean of n seeds: the mean over seeds of calibration text, ± the standard deviation over seeds.")
    lines.append(
        "Active: parameters a token passes through, embeddings included: all but routed experts beyond its top-k "
        "(soft: one merged expert a layer). Tokens a second: prefill of 8 prompts and greedy decoding of the 8 "
        f"together, float32 on {settings.device}. Memory: the most while the model is loaded and "
        "scored. Patching: its seconds, and the peak resident memory of its process, the libraries' own included."
    )
    if comparison.sized:
        own = [label for label, one in comparison.plan.requests.items() if one.recipe and one.recipe.own_class]
        lines += [EQUAL_BYTES, *([f"Not quantised, of this package's own class: {', '.join(own)}."] if own else [])]
    return [*lines, *_warnings(comparison)]


def _warnings(comparison: Comparison) -> list[str]:
    lines = []
    if len({(one["threads"], one["at_once"]) for one in comparison.results.values()}) > 1:
        lines.append("Times are not comparable: rows were measured with different numbers of threads or --jobs.")
    elif any(one["at_once"] > 1 for one in comparison.results.values()):
        at_once = max(one["at_once"] for one in comparison.results.values())
        lines.append(f"Times are not comparable: {at_once} models were measured side by side.")
    lines += [
        f"The same recipe as {first}, measured once: {label}."
        for label, first in comparison.plan.same.items()
        if label != first
    ]
    lines += [
        f"{cell.label}: without {', '.join(cell.unused)}, which {'does' if len(cell.unused) == 1 else 'do'} not apply."
        for cell in comparison.plan.cells
        if cell.unused
    ]
    return lines + [f"Failed: {label}: {reason}." for label, reason in comparison.failed.items()]


def markdown(comparison: Comparison) -> str:
    """``comparison.md``: the tables, what they mean, and with what they were made."""
    run = comparison.plan.run
    lines = [f"# Recipes on `{comparison.plan.checkpoint.name}`, side by side", ""]
    for title, table in tables(comparison):
        lines += [f"## {title.capitalize()}", "", *table.markdown(numbers=True), ""]
    lines += [f"* {note}" for note in notes(comparison)]
    lines += ["", ", ".join(f"{library} {version}" for library, version in run["versions"].items()) + "."]
    return "\n".join(lines) + "\n"
