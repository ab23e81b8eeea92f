"""What works for which family, tried on its tiny models: ``python -m tests.helpers.family_table`` writes the table of
``docs/families.md``.
"""

import re
import tempfile
from importlib import import_module
from pathlib import Path

from namex_hf import Recipe, load_patched, patch_checkpoint
from namex_hf.errors import NamexError
from namex_hf.families import FAMILIES, Config
from namex_hf.families.outline import Outline, outline_of
from tests.helpers.checkpoints import read_config
from tests.helpers.family_models import ROWS, save_stock
from tests.helpers.recipes import Fields, recipe_of
from tests.helpers.toy_models import add_tokenizer, write_words

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
BEGIN, END = "<!-- written by python -m tests.helpers.family_table -->\n", "<!-- end -->\n"
FEWER: Fields = {"merge": "grouped", "experts": 4}
TRIED: dict[str, Fields] = {
    "narrow": {"merge": "narrow", "width": 8},
    "narrow, `fit: layer`": {"merge": "narrow", "width": 8, "fit": "layer"},
    "grouped": FEWER,
    "`fit: router`": {**FEWER, "fit": "router"},
    "`fit: layer`": {**FEWER, "fit": "layer"},
    "residual": {"merge": "residual"},
    "soft": {"merge": "soft"},
}
"""By the heading of a column."""


def title(model_type: str) -> str:
    """The models of a family: what its file begins with."""
    text = import_module(f"namex_hf.families.known.{model_type}").__doc__
    assert text is not None
    return re.split(r"[.:,](?:\s|$)", text)[0]


def gate_values(config: Config) -> str:
    """Whether those of a token are divided by their sum, and multiplied."""
    gates = [outline_of({**config, "norm_topk_prob": stated}).shape.gate for stated in (True, False)]
    always, never = (all(gate.renormalises is found for gate in gates) for found in (True, False))
    divided = "sum to 1" if always else "as they are" if never else "stated"
    return f"{divided}, scaled" if gates[0].scale != 1 else divided


def choice(outlines: list[Outline]) -> str:
    """What experts are chosen by."""
    parts = [outlines[0].shape.gate.score]
    if any(outline.bias(outline.shape.layers[-1]) for outline in outlines):
        parts.append("bias")
    if any(outline.shape.gate.groups > 1 for outline in outlines):
        parts.append("groups")
    return " + ".join(parts)


def shared_expert(outline: Outline) -> str:
    parts = outline.shared(outline.shape.layers[-1])
    return "–" if not parts else "with a gate" if "gate" in parts else "yes"


def works(source: Path, out: Path, recipe: Recipe) -> bool:
    """Whether the model is patched, and opens."""
    try:
        patch_checkpoint(source, out, recipe)
    except NamexError:
        return False
    load_patched(out)
    return True


def line(model_type: str, folder: Path) -> str:
    """A family's line of the table."""
    words, sources = write_words(folder / "words.txt", 1), []
    for name in (name for name, row in ROWS.items() if row.model_type == model_type):
        sources.append(save_stock(folder / name, name))
        add_tokenizer(sources[-1])
    configs = [read_config(source) for source in sources]
    outlines = [outline_of(config) for config in configs]
    cells = [title(model_type), f"`{model_type}`", choice(outlines), gate_values(configs[-1])]
    cells.append(shared_expert(outlines[0]))
    for number, fields in enumerate(TRIED.values()):
        recipe = recipe_of(words, fields)
        tried = [works(source, folder / f"{source.name}-{number}", recipe) for source in sources]
        cells.append("yes" if all(tried) else "–")
    return f"| {' | '.join(cells)} |\n"


def table(folder: Path) -> str:
    """Every family, in the order of their names."""
    heads = ["models", "`model_type`", "chosen by", "gate values", "shared", *TRIED]
    lines = [f"| {' | '.join(heads)} |\n", f"|{'---|' * len(heads)}\n"]
    for model_type in sorted(FAMILIES):
        (inside := folder / model_type).mkdir()
        lines.append(line(model_type, inside))
    return "".join(lines)


def parts(page: str) -> tuple[str, str, str]:
    """The page before its table, the table, and the rest."""
    before, _, more = page.partition(BEGIN)
    found, _, after = more.partition(END)
    return before + BEGIN, found, END + after


def main() -> None:
    before, _, after = parts(PAGE.read_text("utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        PAGE.write_text(before + table(Path(folder)) + after, "utf-8")


if __name__ == "__main__":
    main()
