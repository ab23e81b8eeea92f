"""What a comparison leaves behind: tables, everything in numbers, a page and its picture."""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from ..evaluation.compare import CELLS, Comparison
from ..evaluation.compare_table import markdown, notes, tables
from ..evaluation.rows import perplexities
from ..files import write_text
from ..render import rendered
from .colours import COLOURS
from .frontier import frontier
from .page import POLICY

if TYPE_CHECKING:
    from .pictures import Picture

TEMPLATES = Path(__file__).parents[1] / "templates"
PAGE, TABLE, NUMBERS = "index.html", "comparison.md", "comparison.json"


def as_json(comparison: Comparison) -> str:
    """``comparison.json``: every row with its recipe in full, and file and key of the losses of its windows."""
    plan, rows = comparison.plan, []
    for row in comparison.rows:
        label = plan.same.get(row.label, row.label)
        stored = {"file": CELLS, "key": plan.key(label)} if label in comparison.results else {"file": None, "key": None}
        rows.append({**asdict(row), "worst": list(row.worst), **stored})
    values = {
        "model": {"name": plan.checkpoint.name, "commit": plan.checkpoint.commit, "bytes": plan.checkpoint.size},
        "run": plan.run,
        "original_perplexity": perplexities(comparison.original),
        "rows": rows,
        **({"equal_bytes": [asdict(one) for one in comparison.sized]} if comparison.sized else {}),
        "failed": comparison.failed,
        "notes": notes(comparison),
    }
    return json.dumps(values, indent=1) + "\n"


def page(comparison: Comparison, pictures: Sequence["Picture"]) -> str:
    """The page as text. Everything that comes from a checkpoint or a file is escaped.

    Args:
        pictures: none where they cannot be drawn; the page is whole without.
    """
    requests, sort = comparison.plan.requests.items(), (TEMPLATES / "sort.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(sort.encode()).digest()).decode()  # the browser runs this script alone
    return rendered(
        "comparison.html",
        title=f"Recipes on {comparison.plan.checkpoint.name}, side by side",
        pictures=pictures,
        tables=tables(comparison),
        notes=notes(comparison),
        recipes={name: yaml.safe_dump(one.identity["recipe"], sort_keys=False) for name, one in requests if one.recipe},
        versions=comparison.plan.run["versions"],
        frontier=frontier(comparison),
        colours=COLOURS,
        sort=sort,
        policy=f"{POLICY}; script-src 'sha256-{digest}'",
    )


def write(comparison: Comparison, out: Path) -> bool:
    """Write all files; returns whether there is a picture, which needs the extra ``report``."""
    write_text(out / TABLE, markdown(comparison))
    write_text(out / NUMBERS, as_json(comparison))
    pictures = _pictures(comparison)
    for one in pictures or []:
        one.write(out)
    write_text(out / PAGE, page(comparison, pictures or []))
    return pictures is not None


def _pictures(comparison: Comparison) -> "list[Picture] | None":
    """None without matplotlib."""
    try:
        from .pictures.comparison import picture
    except ImportError:
        return None
    one = picture(comparison)
    return [] if one is None else [one]
