"""What a comparison leaves behind: tables, everything in numbers, a page and its picture."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from ..evaluation.compare import Comparison
from ..evaluation.compare_table import answers, costs, markdown, notes, quality
from ..evaluation.rows import perplexities
from ..evaluation.store import CellFiles
from ..files import write_text
from ..render import rendered
from .page import POLICY

if TYPE_CHECKING:
    from .pictures import Picture

PAGE, TABLE, NUMBERS = "index.html", "comparison.md", "comparison.json"


def as_json(found: Comparison, out: Path) -> str:
    """``comparison.json``: every row with its recipe in full, and where the losses of its windows stand."""
    plan, cells = found.plan, CellFiles(out, found.plan.run)
    rows = []
    for row in found.rows:
        label = plan.same.get(row.label, row.label)
        file = cells.path(plan.requests[label].identity).relative_to(out).as_posix() if label in found.results else None
        rows.append({**asdict(row), "worst": list(row.worst), "file": file})
    values = {
        "model": {"name": plan.checkpoint.name, "commit": plan.checkpoint.commit, "bytes": plan.checkpoint.size},
        "run": plan.run,
        "original_perplexity": perplexities(found.original),
        "rows": rows,
        "failed": found.failed,
        "notes": notes(found),
    }
    return json.dumps(values, indent=1) + "\n"


def page(found: Comparison, pictures: Sequence["Picture"]) -> str:
    """The page as text. Everything that comes from a checkpoint or a file is escaped.

    Args:
        pictures: none where they cannot be drawn; the page is whole without.
    """
    recipes = {label: one.identity["recipe"] for label, one in found.plan.requests.items() if one.recipe is not None}
    return rendered(
        "comparison.html",
        title=f"Recipes on {found.plan.checkpoint.name}, side by side",
        pictures=pictures,
        quality=quality(found),
        costs=costs(found),
        answers=answers(found),
        notes=notes(found),
        recipes={label: yaml.safe_dump(recipe, sort_keys=False) for label, recipe in recipes.items()},
        versions=found.plan.run["versions"],
        policy=POLICY,
    )


def write(found: Comparison, out: Path) -> bool:
    """Write all files; returns whether there is a picture, which needs the extra ``report``."""
    write_text(out / TABLE, markdown(found))
    write_text(out / NUMBERS, as_json(found, out))
    pictures = _pictures(found)
    for one in pictures or []:
        one.write(out)
    write_text(out / PAGE, page(found, pictures or []))
    return pictures is not None


def _pictures(found: Comparison) -> "list[Picture] | None":
    """None without matplotlib."""
    try:
        from .pictures.comparison import picture
    except ImportError:
        return None
    one = picture(found)
    return [] if one is None else [one]
