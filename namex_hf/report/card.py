"""The model card of a patched folder: what it is, how it was made, what was measured, how to load it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..checkpoint.companions import has_tokenizer
from ..checkpoint.tokenizer_code import tokenizer_code
from ..evaluation.baseline import is_unmerged
from ..evaluation.table import Table
from ..files import PICTURES, REPORT, locate
from ..recipe import Grouped, Recipe
from ..record import Report
from ..render import rendered
from .card_measured import scores_of
from .card_metadata import as_yaml, metadata
from .card_text import fenced, plain, section
from .layers import layer_table, perplexity_table

PLACE = "PATH_OR_ID"
"""Stands for the folder or Hub id in the snippet until it is known."""


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
    recipe = report.run["recipe"]
    merge = Recipe.from_stored(recipe).merge if recipe["merge"] == "grouped" else None
    foreign = [] if folder is None else tokenizer_code(folder)
    return rendered(
        "card.md",
        report=report,
        config=config,
        metadata=metadata(report, source, folder).to_dict(),
        title=_title(report, folder),
        source=_source(report),
        unmerged=is_unmerged(recipe),
        stock=not str(config.get("model_type")).startswith("namex_"),
        grouped=merge if isinstance(merge, Grouped) and recipe["method"] != "smoe" else None,
        place=PLACE,
        opens_tokenizer=folder is None or (has_tokenizer(folder) and not foreign),
        foreign_code=[f"`{path.name}`" for path in foreign],
        perplexity=_escaped(perplexity_table(report)),
        scores=scores_of(report, folder),
        pictures=picture_lines(folder),
        plain=plain,
        as_yaml=as_yaml,
        section=section,
        fenced=fenced,
        layers=_escaped(layer_table(report, "seconds")),
        report_file=REPORT,
    )


def _escaped(table: Table) -> Table:
    return Table(table.titles, [list(map(plain, row)) for row in table.rows])


def _source(report: Report) -> str:
    name, commit = report.source["name"], report.source["commit"]
    if name is None:
        return "a model that is not known"
    if commit is None:
        return f"**{plain(name) or 'a model'}** (a local copy; its hash is in `{REPORT}`)"
    address = f"https://huggingface.co/{quote(name)}/tree/{quote(commit, safe='')}"
    return f"[{plain(name)}]({address}) at commit {plain(commit[:12])}"


def picture_lines(folder: Path | None) -> list[str]:
    """The pictures of the folder's report, linked; nothing where there are none."""
    files = sorted(locate(folder, PICTURES).glob("*.png")) if folder is not None else []
    return linked([path.relative_to(folder).as_posix() for path in files]) if folder is not None else []


def linked(names: Sequence[str]) -> list[str]:
    """Args: names, of pictures: paths below the card's folder, with slashes."""
    if not names:
        return []
    shown = [f"![{plain(Path(name).stem.replace('_', ' '))}]({quote(name)})" for name in names]
    return ["## Pictures", "", *"\n\n".join(shown).split("\n")]
