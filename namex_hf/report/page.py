"""One HTML page out of a report and its pictures: nothing is fetched, nothing is run, light and dark by the reader."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from ..scoring.baseline import is_unmerged
from .report import Report, choices, layer_table, ratio

if TYPE_CHECKING:
    from .pictures import Picture

STYLE = """
:root { color-scheme: light dark; --ink: #0b0d12; --ground: #ffffff; --soft: #5c6370; --line: #d8dce3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --ground: #14171c; --soft: #a3aab8; --line: #343a45; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem; color: var(--ink); background: var(--ground);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; }
figure { margin: 0; }
figure img { display: block; width: 100%; min-width: 40rem; height: auto; }
figcaption, .soft { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: 0.25rem 0.75rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0; }
pre { white-space: pre-wrap; }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
WORDS = {
    "residual": "the top-k experts stay as they are, and a base expert takes what top-k leaves over",
    "soft": "the router merges experts into one, which takes their place",
    "grouped": "each expert is made of a group of the original's",
    "narrow": "every expert and the router stay, with fewer neurons in each expert",
}


def page(report: Report, recipe_text: str, pictures: Sequence["Picture"]) -> str:
    """The page as text. Everything that comes from a checkpoint or a report is escaped.

    Args:
        recipe_text: the recipe as YAML.
        pictures: with at least one element, or none: the page then says so.
    """
    recipe, name = report.run["recipe"], str(report.source["name"] or "a model of unknown source")
    title = f"{name}, patched by namex_hf"
    what = "the sparse original" if is_unmerged(recipe) else WORDS.get(recipe.get("merge"), "")
    parts = [f"<p>{escape(f'{choices(recipe)}: {what}.')}</p>", *_perplexity(report), *map(figure, pictures)]
    if not pictures:
        parts.append("<p>This folder has no data to draw: no expert was weighed and no text was read.</p>")
    titles, rows = layer_table(report)
    parts += ["<h2>Layers</h2>", table(titles, rows), "<h2>Recipe</h2>", f"<pre>{escape(recipe_text)}</pre>"]
    return document(title, parts, report.versions)


def document(title: str, parts: Sequence[str], versions: Mapping[str, str], style: str = "") -> str:
    """A whole page.

    Args:
        parts: HTML of the body, below the title.
        versions: of the libraries, by name; its last line.
        style: CSS beyond `STYLE`.
    """
    libraries = ", ".join(f"{library} {version}" for library, version in versions.items())
    head = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}{style}</style>",
        "</head>",
    ]
    body = ["<body>", "<main>", f"<h1>{escape(title)}</h1>", *parts, f'<p class="soft">{escape(libraries)}</p>']
    return "\n".join([*head, *body, "</main>", "</body>", "</html>", ""])


def figure(picture: "Picture") -> str:
    """A picture with its title and what it says, in ink for light and for dark ground."""
    from .pictures.picture import INK, PALE

    light, dark = (_data(picture.svg(ink), "image/svg+xml") for ink in (INK, PALE))
    title, line = escape(picture.title), escape(picture.line)
    return (
        f"<section><h2>{title}</h2>\n<figure><figcaption>{line}</figcaption>\n"
        f'<div class="wide"><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{title}" src="{light}"></picture></div></figure></section>'
    )


def _data(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _perplexity(report: Report) -> list[str]:
    if not report.perplexity:
        return []
    rows = [
        [domain, f"{one['before']:.2f}", f"{one['after']:.2f}", f"{ratio(one):.3f}"]
        for domain, one in report.perplexity.items()
    ]
    return ["<h2>Perplexity on held-out text</h2>", table(["domain", "before", "after", "ratio"], rows)]


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls where the screen is narrow."""
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'
