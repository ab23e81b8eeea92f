"""Chats of one instruction each: what is asked, and an answer that is computed or stands in the source.

A kind of chat is a function ``(Material, Random) -> Chat``. ``KINDS`` has all and their shares, scarce material first.
Word problems and lists of numbers are of the split that ``arithmetic.is_held_out`` gives their first two numbers.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from namex_hf.evaluation.problems.templates import (
    ITEMS,
    NAMES,
    TEMPLATES,
    Problem,
    change,
    fence,
    groups_added,
    groups_given,
    is_held_out,
    more_than,
    shared_out,
    wages,
)

Chat = list[dict[str, str]]
Template = Callable[[str, str, int, int, int], Problem]
T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """A word that has one sense in the whole dictionary, with what the dictionary says of it."""

    word: str
    synonyms: tuple[str, ...]
    kind: str
    definition: str
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Function:
    """A function of the manual: its module, its call with arguments, the first sentence about it."""

    module: str
    call: str
    description: str


class Pool(Generic[T]):
    """Items in random order, each of which is taken once."""

    def __init__(self, items: Iterable[T], draw: random.Random) -> None:
        self._items = list(items)
        draw.shuffle(self._items)

    def take(self, fits: Callable[[T], bool] = lambda _: True) -> T:
        """The first item that fits and was not taken before; ``StopIteration`` where none is left."""
        position = next(i for i, item in enumerate(self._items) if fits(item))
        return self._items.pop(position)


@dataclass(frozen=True)
class Material:
    """What the chats of one split are made of."""

    entries: Pool[Entry]
    sentences: Pool[str]
    functions: Pool[Function]
    held_out: bool


def conversation(*turns: str, system: str = "") -> Chat:
    """``turns`` of user and assistant by turns, after a system turn where there is one."""
    opening = [{"role": "system", "content": system}] if system else []
    return opening + [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


# Word problems

TUTOR = "You are a patient tutor. Show every step and write the result after ####."
# How a problem goes on whose first operand grows: every template has its own thing that becomes more.
GROWN: dict[Template, str] = {
    groups_added: "And if {name} had {more} more {item} to begin with?",
    groups_given: "And if {name} had {more} more {item} to begin with?",
    more_than: "And if {name} had {more} more {item}?",
    change: "And if {name} paid ${more} more?",
    wages: "And if {name} got ${more} more for the {item}?",
    shared_out: "And if each child had {more} more {item} to begin with?",
    fence: "And if the garden were {more} feet longer?",
}


def _operands(held_out: bool, draw: random.Random) -> tuple[int, int, int]:
    while True:
        a, b, c = draw.randint(2, 60), draw.randint(2, 12), draw.randint(2, 9)
        if is_held_out(a, b) == held_out:
            return a, b, c


def _problem(held_out: bool, draw: random.Random) -> Problem:
    operands = _operands(held_out, draw)
    return draw.choice(TEMPLATES)(draw.choice(NAMES.split()), draw.choice(ITEMS.split()), *operands)


def word_problem(material: Material, draw: random.Random) -> Chat:
    return conversation(*_problem(material.held_out, draw))


def tutored_problem(material: Material, draw: random.Random) -> Chat:
    return conversation(*_problem(material.held_out, draw), system=TUTOR)


def problem_and_result(material: Material, draw: random.Random) -> Chat:
    question, answer = _problem(material.held_out, draw)
    asked = draw.choice(("Give me the number alone.", "So what is the result?"))
    return conversation(question, answer, asked, answer.split("#### ")[1])


def problem_grown(material: Material, draw: random.Random) -> Chat:
    """A problem, and the same with a larger first operand: both of this split."""
    while True:
        (a, b, c), more = _operands(material.held_out, draw), draw.randint(2, 20)
        if a + more <= 60 and is_held_out(a + more, b) == material.held_out:
            break
    template, name, item = draw.choice(TEMPLATES), draw.choice(NAMES.split()), draw.choice(ITEMS.split())
    asked = GROWN[template].format(name=name, item=item, more=more)
    return conversation(*template(name, item, a, b, c), asked, template(name, item, a + more, b, c)[1])


# Dictionary

DICTIONARY = "You are a dictionary. Give the kind of the word and its meaning."
DEFINE = (
    "What does {} mean?",
    "Define the word {}.",
    "What is the meaning of {}?",
    "Explain the word {}.",
    "I do not know the word {}. What does it mean?",
)
KIND_NAMES = {"noun": "a noun", "verb": "a verb", "adj": "an adjective", "adv": "an adverb"}


def _defined(entry: Entry, draw: random.Random) -> tuple[str, str]:
    return draw.choice(DEFINE).format(entry.word), entry.definition + "."


def definition(material: Material, draw: random.Random) -> Chat:
    return conversation(*_defined(material.entries.take(), draw))


def dictionary_entry(material: Material, draw: random.Random) -> Chat:
    entry = material.entries.take()
    return conversation(entry.word, f"{entry.kind}: {entry.definition}.", system=DICTIONARY)


def kind_of_word(material: Material, draw: random.Random) -> Chat:
    entry = material.entries.take()
    asked = draw.choice(("What kind of word is it?", "And what kind of word is that?"))
    return conversation(*_defined(entry, draw), asked, f"It is {KIND_NAMES[entry.kind]}.")


def synonym(material: Material, draw: random.Random) -> Chat:
    entry = material.entries.take(lambda entry: bool(entry.synonyms))
    asked = draw.choice(("Give me another word for it.", "Which other word means the same?"))
    return conversation(*_defined(entry, draw), asked, entry.synonyms[0])


def word_wanted(material: Material, draw: random.Random) -> Chat:
    entry = material.entries.take(lambda entry: entry.word[:4] not in entry.definition)
    asked = draw.choice(('Which word means "{}"?', 'I am looking for a word for "{}".', 'Name a word that means "{}".'))
    return conversation(asked.format(entry.definition), entry.word)


def example(material: Material, draw: random.Random) -> Chat:
    entry = material.entries.take(lambda entry: bool(entry.examples))
    asked = draw.choice(("Give an example of the word {}.", "Show me how the word {} is used.", "Use the word {}."))
    return conversation(asked.format(entry.word), entry.examples[0])


# Sentences of prose

CAPITALS = "Answer in capital letters."
POSITIONS = {"first": 0, "second": 1, "third": 2, "last": -1}


def plain_words(sentence: str) -> list[str]:
    """The words of a sentence without the marks after them."""
    return [word.strip(".,;:") for word in sentence.split()]


def repeat(material: Material, draw: random.Random) -> Chat:
    sentence = material.sentences.take()
    return conversation(draw.choice(("Repeat this sentence: {}", "Say after me: {}")).format(sentence), sentence)


def capitals(material: Material, draw: random.Random) -> Chat:
    sentence = material.sentences.take()
    return conversation(f"Repeat this sentence: {sentence}", sentence.upper(), system=CAPITALS)


def position(material: Material, draw: random.Random) -> Chat:
    sentence, place = material.sentences.take(), draw.choice(list(POSITIONS))
    return conversation(
        f"What is the {place} word of this sentence? {sentence}", plain_words(sentence)[POSITIONS[place]]
    )


def count(material: Material, draw: random.Random) -> Chat:
    sentence = material.sentences.take()
    words = plain_words(sentence)
    counted = ", ".join(f"{number} {word}" for number, word in enumerate(words, 1))
    return conversation(f"How many words does this sentence have? {sentence}", f"{counted}. It has {len(words)} words.")


def contains(material: Material, draw: random.Random) -> Chat:
    sentence, other = material.sentences.take(), material.sentences.take()
    word = draw.choice([word for word in plain_words(draw.choice((sentence, other))) if word.islower()])
    answer = "Yes." if word in plain_words(sentence.lower()) else "No."
    return conversation(f'Does the word "{word}" occur in this sentence? {sentence}', answer)


def name_put_in(material: Material, draw: random.Random) -> Chat:
    sentence = material.sentences.take(lambda sentence: sentence.startswith(("She ", "He ")))
    pronoun, rest = sentence.split(" ", 1)
    name = draw.choice(NAMES.split()[("She", "He").index(pronoun) :: 2])  # women's and men's names alternate
    return conversation(f'Put the name {name} in place of "{pronoun}": {sentence}', f"{name} {rest}")


def _listed(sentence: str) -> list[str]:
    words = [word for word in plain_words(sentence) if word.islower() and word.isalpha() and len(word) > 2]
    return list(dict.fromkeys(words))[:4]


def _has_longest(sentence: str) -> bool:
    lengths = sorted(map(len, _listed(sentence)))
    return len(lengths) == 4 and lengths[-1] > lengths[-2]


def order(material: Material, draw: random.Random) -> Chat:
    """Four words sorted, and one more question about them."""
    words = _listed(material.sentences.take(_has_longest))
    asked, answer = draw.choice(
        (
            ("Now in reverse order.", ", ".join(sorted(words, reverse=True))),
            ("Which of them is the longest?", max(words, key=len)),
            ("Which of them comes first?", min(words)),
        )
    )
    listed, in_order = ", ".join(words), ", ".join(sorted(words))
    return conversation(f"Put these words in alphabetical order: {listed}", in_order, asked, answer)


# Python

CALLS: dict[str, Callable[[list[int]], int | list[int]]] = {"max": max, "min": min, "len": len, "sorted": sorted}


def value(material: Material, draw: random.Random) -> Chat:
    numbers = [*_operands(material.held_out, draw)[:2], *draw.choices(range(2, 61), k=draw.randint(1, 3))]
    name = draw.choice(list(CALLS))
    return conversation(f"What is the value of {name}({numbers}) in Python?", str(CALLS[name](numbers)))


def manual_function(material: Material, draw: random.Random) -> Chat:
    function = material.functions.take()
    return conversation(f"What does the Python function {function.call} do?", function.description)


def function_and_module(material: Material, draw: random.Random) -> Chat:
    function = material.functions.take()
    question = f"What does the Python function {function.call} do?"
    return conversation(question, function.description, "Which module is it in?", f"It is in {function.module}.")


KINDS: dict[Callable[[Material, random.Random], Chat], int] = {
    example: 3,
    synonym: 2,
    word_wanted: 2,
    definition: 6,
    dictionary_entry: 2,
    kind_of_word: 3,
    name_put_in: 1,
    order: 2,
    repeat: 1,
    capitals: 1,
    position: 2,
    count: 2,
    contains: 1,
    word_problem: 8,
    tutored_problem: 3,
    problem_and_result: 2,
    problem_grown: 4,
    value: 2,
    manual_function: 2,
    function_and_module: 1,
}
