"""A table of text that prints to a terminal, to markdown and to HTML."""

from collections.abc import Collection, Iterable, Mapping
from html import escape
from typing import TYPE_CHECKING, NamedTuple

from ..printable import marked

if TYPE_CHECKING:
    from rich.table import Table as ScreenTable

LABEL = 22
"""Characters of a label that are not wrapped, where a table is cut into parts."""
GAP = 2
"""Characters between the columns of such a part."""


class Table(NamedTuple):
    """Titles of the columns, and rows with a cell for each. The first column tells the rows."""

    titles: list[str]
    rows: list[list[str]]

    def markdown(self, numbers: bool = False) -> list[str]:
        """Lines of markdown. A ``|`` in a cell is escaped, other marks are not.

        Args:
            numbers: align all columns but the first to the right.
        """
        rule = "|---" + ("|---:" if numbers else "|---") * (len(self.titles) - 1) + "|"
        return [_line(self.titles), rule, *map(_line, self.rows)]

    def html(self) -> str:
        """A table that scrolls where the screen is narrow; everything in it is escaped."""
        head = "".join(f"<th>{escape(title)}</th>" for title in self.titles)
        body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows)
        return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'

    def screen(self, title: str | None = None, words: Collection[str] = (), compact: bool = False) -> "ScreenTable":
        """For a terminal. Where it is narrow, titles are wrapped between words; numbers never are.

        Args:
            words: titles of columns of words, which are aligned to the left and may be wrapped, as the first is.
            compact: without borders; a long label in the first column is wrapped.
        """
        from rich import box
        from rich.table import Table as ScreenTable

        shown = ScreenTable(title=None if title is None else marked(title))
        if compact:
            shown.box, shown.padding = box.SIMPLE_HEAD, (0, 1, 0, 0)
        for place, (name, width) in enumerate(zip(self.titles, self.widths(), strict=True)):
            is_text = not place or name in words
            shown.add_column(
                marked(name),
                justify="left" if is_text else "right",
                width=width if compact else None,
                min_width=None if is_text else width,
                overflow="fold",
            )
        for row in self.rows:
            shown.add_row(*map(marked, row))
        return shown

    def screens(self, width: int, title: str, words: Collection[str] = ()) -> "list[ScreenTable]":
        """One table with borders where a terminal of so many characters has room for it, else `parts` without."""
        if sum(self.widths()) + 3 * len(self.titles) < width:
            return [self.screen(title, words)]
        return [part.screen(title, words, compact=True) for part in self.parts(width)]

    def widths(self) -> list[int]:
        """Characters that each column needs: of a title the longest word, of a cell all, of a label at most `LABEL`."""
        columns = zip(self.titles, *self.rows, strict=True)
        first, *others = (max(map(len, (*title.split(), *cells)), default=0) for title, *cells in columns)
        return [min(first, LABEL), *others]

    def only(self, places: Iterable[int]) -> "Table":
        """The table of some columns."""
        chosen = list(places)
        return Table([self.titles[at] for at in chosen], [[row[at] for at in chosen] for row in self.rows])

    def parts(self, width: int) -> list["Table"]:
        """Tables of so many characters: columns that have no room go to further ones, which repeat the first two."""
        wide = self.widths()
        parts: list[list[int]] = [[]]
        for place in range(2, len(self.titles)):
            if parts[-1] and sum(wide[at] + GAP for at in (0, 1, *parts[-1], place)) > width:
                parts.append([])
            parts[-1].append(place)
        return [self.only((0, 1, *part)) for part in parts]


def facts(values: Mapping[str, str], title: str | None = None) -> "ScreenTable":
    """Names and values for a terminal, a row each."""
    from rich.table import Table as ScreenTable

    shown = ScreenTable(title=title, show_header=False, min_width=60)
    for name, value in values.items():
        shown.add_row(name, marked(value))
    return shown


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
