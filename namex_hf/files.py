"""Names of the files of a model folder, and how a small file is written.

What this package adds to a model lies in a folder of its own, ``namex/``, so that a program which opens every
``*.safetensors`` file of a model folder meets the model alone. Releases before 0.2.0 put it beside the weights:
`found` reads both places.
"""

import os
from pathlib import Path

CONFIG, CARD, SINGLE, INDEX = "config.json", "README.md", "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
OURS = "namex"
"""The folder of all that this package adds."""
RECIPE, REPORT, SCORES = f"{OURS}/recipe.yaml", f"{OURS}/report.json", f"{OURS}/scores.json"
STATISTICS, PICTURES, PAGE = f"{OURS}/statistics.safetensors", f"{OURS}/pictures", "report.html"
BEFORE_0_2 = {
    RECIPE: "namex_recipe.yaml",
    REPORT: "namex_report.json",
    SCORES: "namex_scores.json",
    STATISTICS: "namex_statistics.safetensors",
    PICTURES: "namex_report",
}
"""Where releases before 0.2.0 put the same."""


def found(folder: Path, name: str) -> Path:
    """Where a file of `BEFORE_0_2` lies in a folder; the place of today where it is in neither."""
    now = folder / name
    before = folder / BEFORE_0_2[name]
    return before if before.exists() and not now.exists() else now


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file so that it is whole or not there; its folder is made where it is missing."""
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text, in UTF-8."""
    write_bytes(path, text.encode())
