"""The model card of a patched folder: what it is, how it was made, what was measured, how to load it."""

from pathlib import Path
from typing import Any

from ..evaluation.table import Table
from ..files import REPORT
from ..record import Report
from .card_measured import perplexity_lines, training_lines
from .card_metadata import as_yaml, metadata
from .card_story import limit_lines, loading_lines, picture_lines, story_lines
from .card_text import fenced, plain, section
from .layers import layer_table

PAPER = "Nguyen et al., *Expert Merging in Sparse Mixture of Experts with Nash Bargaining*"


def _title(report: Report, folder: Path | None) -> str:
    name = report.source["name"]
    if name is None:
        return "A model" if folder is None else folder.resolve().name
    return str(name.rsplit("/", 1)[-1])


def card(report: Report, config: dict[str, Any], folder: Path | None = None, source: Path | None = None) -> str:
    """Markdown with the Hub's metadata block on top. What a checkpoint says of itself is escaped.

    Args:
        config: of the finished folder.
        folder: the finished folder, looked at for pictures, tokenizer, licence and the scores item by item.
        source: the folder that it was made of, looked at for licence, languages and tags.
    """
    recipe, made = report.run["recipe"], "Report rebuilt" if report.run.get("rebuilt") else "Made"
    data = metadata(report, source, folder).to_dict()
    layers = layer_table(report, "seconds")
    lines = [
        "---",
        as_yaml(data),
        "---",
        "",
        f"# {plain(_title(report, folder))}, patched by namex_hf",
        "",
        *story_lines(report),
        "",
        "## Load it",
        "",
        *loading_lines(config, folder),
        *perplexity_lines(report),
        *training_lines(report, folder),
        "",
        section("scores", []),
        section("pictures", picture_lines(folder)),
        "",
        "## Recipe",
        "",
        *fenced(as_yaml(recipe), "yaml"),
        "",
        "## Layers",
        "",
        *Table(layers.titles, [list(map(plain, row)) for row in layers.rows]).markdown(),
        "",
        "## Limits",
        "",
        *limit_lines(report, data, config),
        "",
        f"{made} with `namex_hf` {plain(report.versions['namex_hf'])}; method: {PAPER}. Details in `{REPORT}`.",
        "",
    ]
    return "\n".join(lines)
