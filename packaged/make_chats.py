"""Write the packaged chats for supervised fine-tuning, in SmolTalk's form: ``python packaged/make_chats.py``."""

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import corpora
from instructions import KINDS, Chat, Entry, Function, Material, Pool

TIMES = {"train": 12, "held_out": 3}  # the shares of the kinds, which sum to 50: 600 chats and 150
SEED = 6
FUNCTION = re.compile(
    r"^\.\. (?:(?:current)?module:: (?P<module>\S+)|function:: (?P<call>[^\n]*\))\n\n(?P<about>(?:   \S[^\n]*\n)+))",
    re.MULTILINE,
)
ROLE = re.compile(r":[\w:]+:`[~!]?([^`<]*?)(?: <[^`]*>)?`")
VERBS = "Add Call Change Check Compare Convert Copy Create Decode Delete Determine Encode Format Generate Get Make Open"
VERBS += " Parse Perform Print Read Register Remove Replace Return Run Send Set Split Test Translate Write"
# What a function does, told without the sentence before it and without examples.
DEED = re.compile(rf"(?:{VERBS.replace(' ', '|')})s? (?:(?!\.[. ]|e\.g|i\.e|following)[^*`:]){{15,150}}\.(?= |$)")
UNFIT = {"backwardness", "blowsy", "hussy", "niggardly"}  # insults, or easily taken for one
INFLECTED = re.compile(r".*(ed|ing|er|est|[^s]s)")
T = TypeVar("T")
Split = tuple[list[T], list[T]]  # to train on, held out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("packaged/work"), help="where the sources are or will be")
    parser.add_argument("--out", type=Path, default=Path("namex_hf/packaged/chats"))
    arguments = parser.parse_args()
    corpora.fetch(arguments.work / "sources")
    arguments.out.mkdir(parents=True, exist_ok=True)
    sources = arguments.work / "sources"
    words, prose, manual = entries(sources), sentences(sources), functions(sources)
    for held_out, (name, times) in enumerate(TIMES.items()):
        draw = random.Random(SEED + held_out)
        pools = Pool(words[held_out], draw), Pool(prose[held_out], draw), Pool(manual[held_out], draw)
        material = Material(*pools, held_out=bool(held_out))
        lines = [json.dumps({"messages": chat}, ensure_ascii=False) for chat in chats(material, times, draw)]
        (arguments.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def chats(material: Material, times: int, draw: random.Random) -> list[Chat]:
    """``times`` the share of every kind, in random order; nothing is asked twice."""
    made: dict[str, Chat] = {}
    for make, share in KINDS.items():
        wanted = len(made) + share * times
        while len(made) < wanted:
            chat = make(material, draw)
            made.setdefault(next(turn["content"] for turn in chat if turn["role"] == "user"), chat)
    shuffled = list(made.values())
    draw.shuffle(shuffled)
    return shuffled


def entries(folder: Path) -> Split[Entry]:
    """Words of one sense, one a synset; those to train on are common: the novels have them, and they are not inflected.

    (Of an inflected form the dictionary has rare senses alone: "smoothed" is "made smooth by ironing".) A definition
    that occurs twice, in one split or in both, is left out.
    """
    synsets = list(corpora.synsets(folder))
    senses = Counter(word for words, *_ in synsets for word in {word.lower() for word in words})
    novels = " ".join(text for text, held_out in corpora.prose(folder) if not held_out)
    common = {word for word in re.findall(r"\b[a-z]+\b", novels) if not INFLECTED.fullmatch(word)} - UNFIT
    split: Split[Entry] = ([], [])
    for words, kind, gloss, lexicon in synsets:
        held_out = lexicon in corpora.HELD_OUT_LEXICON
        fit = [w for w in words if re.fullmatch("[a-z]{3,14}", w) and senses[w] == 1 and (held_out or w in common)]
        definition = re.split(r'; | *"', gloss)[0]
        if fit and 15 <= len(definition) <= 90 and re.fullmatch(r"[\w ,'-]+", definition, re.ASCII):
            synonyms = tuple(word for word in words if word[:2] != fit[0][:2])
            examples = tuple(e for e in re.findall(r'"([^"`]+)"', gloss) if re.search(rf"\b{fit[0]}\b", e))
            split[held_out].append(Entry(fit[0], synonyms, kind, definition, examples))
    return _apart(split, lambda entry: entry.definition)


def sentences(folder: Path) -> Split[str]:
    """Sentences of 5 to 12 words with commas alone inside: no quotation mark, no abbreviation."""
    split: Split[str] = ([], [])
    for chapter, held_out in corpora.prose(folder):
        text = " ".join(chapter.split())
        for sentence in re.split(r"(?<=[.!?])(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)(?<!St\.)\s+", text):
            if re.fullmatch(r"[A-Z][a-z]*(,? [A-Za-z]*[a-z]|,? I){4,11}\.", sentence):
                split[held_out].append(sentence)
    return _apart(split, str)


def functions(folder: Path) -> Split[Function]:
    """The manual's functions with the sentence that opens their description, markup taken out."""
    split: Split[Function] = ([], [])
    for text, held_out in corpora.manual(folder):
        module = ""
        for directive in FUNCTION.finditer(text):
            module = directive["module"] or module
            sentence = _first_sentence(directive["about"] or "")
            if module and sentence and len(directive["call"]) <= 60:
                split[held_out].append(Function(module, f"{module}.{directive['call']}", sentence))
    return _apart(split, lambda function: function.description)


def _first_sentence(paragraph: str) -> str:
    """The first sentence of a paragraph of reStructuredText in plain words, or nothing if it does not tell a deed."""
    text = ROLE.sub(r"\1", " ".join(paragraph.split()))
    text = re.sub(r"``([^`]+)``|\*(\w+)\*", lambda marked: marked[1] or marked[2], text)
    told = DEED.match(text)
    return told[0] if told else ""


def _apart(split: Split[T], text: Callable[[T], str]) -> Split[T]:
    """What has its text to itself: items whose ``text`` another item has, of either split, are left out."""
    held = Counter(text(item) for items in split for item in items)
    return [item for item in split[0] if held[text(item)] == 1], [item for item in split[1] if held[text(item)] == 1]


if __name__ == "__main__":
    main()
