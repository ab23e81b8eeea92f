"""A local copy of GSM8K in the form that lm-eval's own ``gsm8k`` reads without the Hub.

``python eval/make_local_gsm8k.py --source DIR --out data`` reads ``train.jsonl`` and ``test.jsonl`` as OpenAI publishes
them (a question and an answer a line) and writes ``data/openai/gsm8k``. Then
``python eval/zero_shot.py --tasks gsm8k --data data`` needs no network.
"""

import argparse
import sys
from pathlib import Path

from namex_hf.commands.common import Parser, ended
from namex_hf.errors import MissingExtraError, NamexError
from namex_hf.files import bounded_lines, open_regular, parse_json

SPLITS = ("train", "test")
CARD = """\
---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*.parquet
  - split: test
    path: main/test-*.parquet
---
"""


class DataError(NamexError):
    """A source file that is not what GSM8K's are."""


def rows(path: Path) -> list[dict[str, str]]:
    """Question and answer of every line.

    Raises:
        DataError: no such file, or a line that is something else.
    """
    with open_regular(path, DataError) as file:
        return [_row(path, number, line) for number, line in enumerate(bounded_lines(file, path, DataError), 1)]


def _row(path: Path, number: int, line: bytes) -> dict[str, str]:
    found = parse_json(line, f"{path}, line {number}", DataError)
    try:
        return {"question": str(found["question"]), "answer": str(found["answer"])}
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}, line {number}: needed: a JSON object with 'question' and 'answer'") from error


def write(source: Path, out: Path) -> Path:
    """Write the data set; returns its folder."""
    try:
        from datasets import Dataset
    except ImportError as error:
        raise MissingExtraError("eval/make_local_gsm8k.py", "eval") from error
    read = {split: rows(source / f"{split}.jsonl") for split in SPLITS}
    folder = out / "openai" / "gsm8k"
    (folder / "main").mkdir(parents=True, exist_ok=True)
    for split, found in read.items():
        Dataset.from_list(found).to_parquet(folder / "main" / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text(CARD, "utf-8")
    return folder


def _written(source: Path, out: Path) -> None:
    write(source, out)


def main() -> int:
    parser = Parser(
        prog="make_local_gsm8k.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True, help="folder with train.jsonl and test.jsonl")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for --data of zero_shot.py, outside the repository"
    )
    options = parser.parse_args()
    return ended(parser.prog, lambda: _written(options.source, options.out), "stopped")


if __name__ == "__main__":
    sys.exit(main())
