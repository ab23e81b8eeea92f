"""Write the packaged held-out text and word problems: ``python packaged/make_held_out.py``."""

import argparse
import json
from pathlib import Path

import corpora
import data

from namex_hf.evaluation.problems.templates import problems

PROBLEMS, SEED = 200, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("packaged/work"), help="where the sources are or will be")
    parser.add_argument("--out", type=Path, default=Path("namex_hf/packaged/held_out"))
    arguments = parser.parse_args()
    corpora.fetch(arguments.work / "sources")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, text in data.held_out(arguments.work / "sources").items():
        (arguments.out / f"{name}.txt").write_text(text, "utf-8")
    with (arguments.out / "arithmetic.jsonl").open("w") as file:
        for question, answer in problems(PROBLEMS, SEED, held_out=True):
            print(json.dumps({"question": question, "answer": answer}), file=file)


if __name__ == "__main__":
    main()
