"""Text of the packaged models, read out of Debian and PyPI packages (see namex_hf/packaged/PROVENANCE.md).

Every domain is split by whole file, book or lexicographer file: nothing held out shares a source file with
anything trained on.
"""

import random
import re
import struct
import subprocess
import sys
import sysconfig
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from namex_hf.evaluation.problems.templates import problems

DEBIAN = {
    "prose": "r-cran-janeaustenr",
    "dictionary": "wordnet-base",
    "manual": "python3.11-doc",
}
CHATS = "chatterbot-corpus==1.3.3"
HELD_OUT_NOVEL = b"NORTHANGER ABBEY"
HELD_OUT_LEXICON = {13, 43, 44}  # noun.food, verb.weather, adj.ppl
SKIPPED_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "turtledemo", "encodings", "site-packages"}
R_STRING = re.compile(rb"\x00[\x00-\x0f][\x00-\xff]\x09(....)", re.DOTALL)

Document = tuple[str, bool]  # text, held out?


def fetch(folder: Path) -> None:
    """Download and unpack the source packages below ``folder`` (needs apt-get, dpkg-deb and pip)."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in DEBIAN.values():
        if not (folder / package).is_dir():
            subprocess.run(["apt-get", "download", package], cwd=folder, check=True)
            archive = next(folder.glob(f"{package}_*.deb"))
            subprocess.run(["dpkg-deb", "-x", archive, folder / package], check=True)
    if not (folder / "chats").is_dir():
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, CHATS], check=True)
        with zipfile.ZipFile(next(folder.glob("chatterbot_corpus-*.whl"))) as wheel:
            wheel.extractall(folder / "chats")


def _held_out_file(name: str, one_in: int) -> bool:
    return zlib.crc32(name.encode()) % one_in == 0


def _r_objects(database: bytes) -> Iterator[bytes]:
    """Inflate the chunks of an R lazy-load file: a four-byte length, then a zlib stream, end to end."""
    position = 0
    while position < len(database):
        stream = zlib.decompressobj()
        yield stream.decompress(database[position + 4 :])
        position = len(database) - len(stream.unused_data)


def prose(folder: Path) -> Iterator[Document]:
    """Six novels of Jane Austen, a document a chapter; the shortest novel is held out whole."""
    database = next((folder / DEBIAN["prose"]).rglob("data/Rdata.rdb")).read_bytes()
    for chunk in _r_objects(database):
        lines = []
        for match in R_STRING.finditer(chunk):
            length = struct.unpack(">i", match[1])[0]
            if 0 <= length < 1000 and match.end() + length <= len(chunk):
                lines.append(chunk[match.end() : match.end() + length].decode("utf-8", "ignore"))
        book = "\n".join(lines)
        if len(book) > 100_000:
            held_out = HELD_OUT_NOVEL.decode() in book[:2000]
            for chapter in re.split(r"\n(?=chapter )", book, flags=re.IGNORECASE):
                yield chapter.strip(), held_out


def synsets(folder: Path) -> Iterator[tuple[list[str], str, str, int]]:
    """(words, kind of word, gloss, lexicographer file) of every synset of WordNet."""
    for kind in ("noun", "verb", "adj", "adv"):
        for line in (next((folder / DEBIAN["dictionary"]).rglob(f"data.{kind}"))).read_text("latin-1").splitlines():
            if line.startswith("  "):
                continue
            fields, gloss = line.split(" | ", 1)
            parts = fields.split()
            words = [re.sub(r"\(\w+\)$", "", parts[4 + 2 * i]).replace("_", " ") for i in range(int(parts[3], 16))]
            yield words, kind, gloss.strip(), int(parts[1])


def dictionary(folder: Path) -> Iterator[Document]:
    """WordNet's words with gloss and example; three lexicographer files are held out."""
    for words, kind, gloss, lexicon in synsets(folder):
        yield f"{', '.join(words)} ({kind}): {gloss}", lexicon in HELD_OUT_LEXICON


def code(folder: Path) -> Iterator[Document]:
    """Python's standard library without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not SKIPPED_LIBRARY.intersection(relative.parts):
            yield path.read_text("utf-8", "ignore"), _held_out_file(str(relative), 25)


def manual(folder: Path) -> Iterator[Document]:
    """The Python manual in its source form."""
    root = next((folder / DEBIAN["manual"]).rglob("html/_sources"))
    for path in sorted(root.rglob("*.txt")):
        relative = path.relative_to(root)
        yield path.read_text("utf-8", "ignore"), _held_out_file(str(relative), 25)


def as_text(question: str, answer: str) -> str:
    """The plain form of a word problem, in which the models were trained and are asked."""
    return f"Question: {question}\nAnswer: {answer}"


def arithmetic(folder: Path) -> Iterator[Document]:
    """Word problems of our own templates; the operands of the splits are disjoint."""
    for held_out, count, seed in ((False, 60_000, 1), (True, 600, 2)):
        for question, answer in problems(count, seed, held_out):
            yield as_text(question, answer), held_out


def conversations(folder: Path) -> Iterator[list[dict[str, str]]]:
    """Chats to train on: word problems, definitions, and small talk."""
    for question, answer in problems(12_000, seed=3, held_out=False):
        yield [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    draw = random.Random(4)
    asked = ("What does {} mean?", "Define the word {}.", "What is the meaning of {}?")
    for words, _, gloss, lexicon in synsets(folder):
        if lexicon not in HELD_OUT_LEXICON and draw.random() < 0.08:
            content = draw.choice(asked).format(words[0])
            yield [{"role": "user", "content": content}, {"role": "assistant", "content": gloss.split("; ")[0] + "."}]
    for path in sorted((folder / "chats").rglob("english/*.yml")):
        for turns in yaml.safe_load(path.read_text("utf-8"))["conversations"]:
            roles = ("user", "assistant")
            chat = [{"role": roles[i % 2], "content": str(turn)} for i, turn in enumerate(turns)]
            if len(chat) > 1:
                yield chat[: len(chat) // 2 * 2]


DOMAINS: dict[str, Callable[[Path], Iterator[Document]]] = {
    "prose": prose,
    "dictionary": dictionary,
    "code": code,
    "manual": manual,
    "arithmetic": arithmetic,
}
