"""The picture of exact answers over bytes: ``python benchmarks/answers_figure.py`` draws docs/pictures/answers.svg.

Its points are the rows of "Equal bytes" in docs/merging.md, and nothing else.
"""

from pathlib import Path

from namex_hf.files import write_text
from namex_hf.render import rendered
from namex_hf.report.colours import COLOURS
from namex_hf.report.frontier import Frontier, Point

DOCS = Path(__file__).parents[1] / "docs"
PICTURE = DOCS / "pictures" / "answers.svg"
BEGINS = "| | weights | bits a parameter | MB |"


def points() -> list[Point]:
    lines = (DOCS / "merging.md").read_text("utf-8").splitlines()
    found = []
    for line in lines[lines.index(next(one for one in lines if one.startswith(BEGINS))) + 2 :]:
        if not line.startswith("|"):
            break
        title, weights, _, megabytes, _, exact = (cell.strip().replace("`", "") for cell in line.strip("|").split("|"))
        found.append(Point(title, weights, float(megabytes), float(exact)))
    return found


def picture() -> str:
    return rendered("frontier.svg", frontier=Frontier(points()), colours=COLOURS, alone=True)


if __name__ == "__main__":
    write_text(PICTURE, picture())
