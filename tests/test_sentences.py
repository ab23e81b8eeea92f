"""Pages for a reader at work have short sentences: README, the tutorial and the how-to pages."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
MOST = 25
"""Words of a sentence."""
END = re.compile(r"(?<!\beq)(?<!\bal)[.!?][)\"']*\s+(?=[^a-z\s]|[a-z]+[./A-Z])")
"""A sentence may begin with a name such as llama.cpp or vLLM."""
WORD = re.compile(r"\w+(?:[-'’.,/]\w+)*")
"""A number with its comma, a name with its point or slash, and a compound are a word each."""
TREES = re.compile(r":caption: (?:Tutorial|How-to)\n.*?\n\n(.*?)```", re.DOTALL)


def pages() -> list[Path]:
    """README and the pages of the first two lists in the index."""
    index = ROOT / "docs" / "index.md"
    entries = [entry for tree in TREES.findall(index.read_text("utf-8")) for entry in tree.splitlines()]
    names = [entry.rpartition("<")[2].removesuffix(">") for entry in entries]
    return [ROOT / "README.md", *((index.parent / f"{name}.md").resolve() for name in names)]


def sentences(markdown: str) -> Iterator[str]:
    """Of paragraphs and list items. Code in a line counts as a word."""
    before = Token("", "", 0)
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        if token.type == "inline" and before.type == "paragraph_open":
            shown = [child for child in token.children or () if child.type != "image"]
            text = " ".join("Code" if child.type == "code_inline" else child.content or "\n" for child in shown)
            yield from END.split(text)
        before = token


def words(sentence: str) -> int:
    return len(WORD.findall(sentence))


def test_what_counts_as_a_sentence():
    text = "One [two](three/four.md) `five six`,\n7.5: **eight**. Nine eq. 2!"
    page = f"# A heading\n\n{text}\n\n* ten\n\n| a | b |\n|---|---|\n| c | d |\n\n    code\n"
    assert [words(one) for one in sentences(page)] == [5, 3, 1]


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_no_sentence_is_too_long(page: Path):
    long = [" ".join(one.split()) for one in sentences(page.read_text("utf-8")) if words(one) > MOST]
    assert long == [], f"sentences of more than {MOST} words in {page.name}"
