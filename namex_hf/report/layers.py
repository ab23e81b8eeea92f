"""The tables of a report: its layers, and perplexity before and after."""

from typing import Any

from ..evaluation.table import Table
from ..record import Report, ratio


def layer_summary(layer: dict[str, Any]) -> dict[str, Any]:
    """The numbers of one layer that fit on a line of a table.

    Errors are of the layer's output to the calibration text, relative to the original's: once merged, and at the end.
    Agreement is the share of a token's experts that the linear router would choose too, load entropy that of the
    experts' shares over that of equal shares.
    """
    games = layer["games"]
    spreads = [game["spread"] for game in games if game["spread"] is not None]
    residuals = [game["residual"] for game in games if game["residual"] is not None]
    words = {game["status"] for game in games}
    errors = [one["error"] for one in layer.get("errors", [])]
    routing = layer.get("routing", {})
    return {
        "layer": layer["layer"],
        "games": len(games),
        "status": ", ".join(sorted(words)) or "no game",
        "spread": max(spreads, default=None),
        "residual": max(residuals, default=None),
        "groups": len(layer["groups"]) if "groups" in layer else None,
        "error_merged": errors[0] if errors else None,
        "error_fitted": errors[-1] if len(errors) > 1 else None,
        "agreement": routing.get("agreement"),
        "load_entropy_linear": routing.get("load_entropy_linear"),
        "load_entropy": routing.get("load_entropy"),
        "seconds": layer["seconds"],
    }


COLUMNS = {
    "layer": ("layer", "d"),
    "groups": ("groups", "d"),
    "games": ("games", "d"),
    "status": ("status", "s"),
    "spread": ("spread of weights", ".4f"),
    "residual": ("residual", ".1e"),
    "error_merged": ("error merged", ".4f"),
    "error_fitted": ("error fitted", ".4f"),
    "agreement": ("agreement with linear", ".3f"),
    "load_entropy_linear": ("load entropy, linear", ".3f"),
    "load_entropy": ("load entropy", ".3f"),
    "seconds": ("seconds", ".2f"),
}
"""Title and form of what `layer_summary` gives to a table."""


def layer_table(report: Report, *left_out: str) -> Table:
    """The table of layers. Columns of text, and of groups, are left out where they say nothing."""
    rows = [layer_summary(layer) for layer in report.layers]
    of_text = ("error_merged", "error_fitted", "agreement", "load_entropy_linear", "load_entropy")
    hidden = {name for name in of_text if all(row[name] is None for row in rows)}
    if len({row["groups"] for row in rows}) == 1:
        hidden.add("groups")
    titles = {name: title for name, (title, _) in COLUMNS.items()}
    if report.run["recipe"]["merge"] == "narrow":
        hidden |= {"games", "status", "spread", "residual"}
        titles["error_merged"] = "error narrowed"
    shown = {name: column for name, column in COLUMNS.items() if name not in hidden.union(left_out)}
    texts = [
        ["" if row[name] is None else format(row[name], form) for name, (_, form) in shown.items()] for row in rows
    ]
    return Table([titles[name] for name in shown], texts)


def perplexity_table(report: Report) -> Table:
    """Perplexity of each domain before and after, with standard errors where there are any."""
    rows = [
        [
            domain,
            with_error(one["before"], one.get("before_stderr")),
            with_error(one["after"], one.get("after_stderr")),
            with_error(ratio(one), one.get("ratio_stderr"), 3),
        ]
        for domain, one in (report.perplexity or {}).items()
    ]
    return Table(["domain", "before", "after", "ratio"], rows)


def with_error(value: float, error: float | None, digits: int = 2) -> str:
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
