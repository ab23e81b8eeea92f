"""Write the packaged benchmark of ``eval/tasks``, held out from training: ``python packaged/make_benchmark.py``.

definitions: a word of WordNet and four glosses, three of which have two neighbouring words exchanged.
sums: a word problem worked out up to a result, and four numbers.
word_problems: examples alone, with operands of the training split; its test is ``held_out/arithmetic.jsonl``.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import corpora

from namex_hf.evaluation.problems.templates import problems

ITEMS, EXAMPLES, SEED = 300, 8, 11
SHORTEST, LONGEST = 6, 14  # words of a gloss
STEPS = (-10, -2, -1, 1, 2, 10)
RESULT = re.compile(r"<<[^=]+=(\d+)>>")

Item = dict[str, object]


def exchanged(words: list[str], place: int) -> str:
    """The words with those at `place` and behind it in each other's place."""
    return " ".join([*words[:place], words[place + 1], words[place], *words[place + 2 :]])


def definitions(folder: Path, draw: random.Random) -> Iterator[Item]:
    """Held-out entries in random order, each gloss once."""
    entries = {
        gloss.split("; ")[0]: f"{words[0]} ({kind}):"
        for words, kind, gloss, lexicon in corpora.synsets(folder)
        if lexicon in corpora.HELD_OUT_LEXICON
    }
    for gloss, word in draw.sample(sorted(entries.items()), len(entries)):
        words = gloss.split()
        wrong = sorted({exchanged(words, place) for place in range(len(words) - 1)} - {gloss})
        if SHORTEST <= len(words) <= LONGEST and "(" not in gloss:
            yield _item(word, gloss, draw.sample(wrong, 3), draw)


def sums(draw: random.Random) -> Iterator[Item]:
    """Problems with held-out operands; which of a problem's results is asked for is drawn."""
    for question, answer in problems(10 * ITEMS, SEED, held_out=True):
        result = draw.choice(list(RESULT.finditer(answer)))
        right = int(result[1])
        wrong = [str(right + step) for step in STEPS if right + step > 0]
        worked = answer[: result.start(1)]
        yield _item(corpora.as_text(question, worked), str(right), draw.sample(wrong, 3), draw)


def _item(context: str, right: str, wrong: list[str], draw: random.Random) -> Item:
    choices = draw.sample([right, *wrong], 4)
    return {"context": context, "choices": choices, "answer": choices.index(right)}


def word_problems() -> Iterator[Item]:
    for question, answer in problems(EXAMPLES, SEED, held_out=False):
        yield {"question": question, "answer": answer}


def write(folder: Path, name: str, items: Iterator[Item], count: int) -> None:
    """The first items as examples, so many others as the test, if any."""
    chosen = [item for _, item in zip(range(EXAMPLES + count), items, strict=False)]
    for split, part in (("examples", chosen[:EXAMPLES]), ("test", chosen[EXAMPLES:])):
        lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in part]
        if lines:
            (folder / f"{name}_{split}.jsonl").write_text("".join(lines), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("packaged/work"), help="where the sources are or will be")
    parser.add_argument("--out", type=Path, default=Path("eval/tasks/data"))
    arguments = parser.parse_args()
    corpora.fetch(arguments.work / "sources")
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw = random.Random(SEED)
    write(arguments.out, "definitions", definitions(arguments.work / "sources", draw), ITEMS)
    write(arguments.out, "sums", sums(draw), ITEMS)
    write(arguments.out, "word_problems", word_problems(), 0)


if __name__ == "__main__":
    main()
