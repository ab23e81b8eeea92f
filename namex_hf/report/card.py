"""The model card of a patched folder: what it is, how it was made, what was measured, how to load it."""

from pathlib import Path
from typing import Any

from ..files import REPORT
from .card_measured import perplexity_lines, training_lines
from .card_metadata import as_yaml, metadata
from .card_story import limit_lines, loading_lines, picture_lines, story_lines
from .card_text import fenced, plain, section, table
from .report import Report, layer_table

PAPER = "Nguyen et al., *Expert Merging in Sparse Mixture of Experts with Nash Bargaining*"


def card(report: Report, config: dict[str, Any], folder: Path | None = None, source: Path | None = None) -> str:
    """Markdown with the Hub's metadata block on top. What a checkpoint says of itself is escaped.

    Args:
        config: of the finished folder.
        folder: the finished folder, looked at for pictures, tokenizer, licence and the scores item by item.
        source: the folder that it was made of, looked at for licence, languages and tags.
    """
    recipe = report.run["recipe"]
    data = metadata(report, source, folder).to_dict()
    titles, rows = layer_table(report, "seconds")
    lines = [
        "---",
        as_yaml(data),
        "---",
        "",
        f"# {plain(report.source['name'].rsplit('/', 1)[-1])}, patched by namex_hf",
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
        *table(titles, [map(plain, row) for row in rows]),
        "",
        "## Limits",
        "",
        *limit_lines(report, data),
        "",
        f"Made with `namex_hf` {plain(report.versions['namex_hf'])}; method: {PAPER}. Details in `{REPORT}`.",
        "",
    ]
    return "\n".join(lines)
