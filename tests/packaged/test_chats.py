"""The packaged chats: SmolTalk's form, answers that are right, and nothing held out among those to train on."""

import importlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoTokenizer

from namex_hf.calibration.sources import PACKAGED as CALIBRATION
from namex_hf.evaluation.arithmetic import held_out_problems
from namex_hf.evaluation.perplexity import held_out_texts

Chat = list[dict[str, str]]
FOLDER = CALIBRATION.parent / "chats"
GENERATOR = Path(__file__).parents[2] / "packaged"
CHATS: dict[str, list[Chat]] = {
    name: [json.loads(line)["messages"] for line in (FOLDER / f"{name}.jsonl").read_text("utf-8").splitlines()]
    for name in ("train", "held_out")
}
EVERY_CHAT = [(name, chat) for name, chats in CHATS.items() for chat in chats]
TIMES = {"train": 12, "held_out": 3}

TUTOR = r"You are a patient tutor\. Show every step and write the result after ####\.\n"
DICTIONARY = r"You are a dictionary\. Give the kind of the word and its meaning\.\n"
CAPITALS = r"Answer in capital letters\.\n"
PROBLEM = r"(?P<question>[A-Z].* (?:How many|How much) [^\n]*\?)"
DEFINE = r"(?:What does|Define the word|What is the meaning of|Explain the word|I do not know the word) (?P<word>\w+)"
DEFINE += r"(?: mean\?|\.|\?|\. What does it mean\?)"
SENTENCE = r"(?P<sentence>[A-Z][\w ,]+\.)"
FUNCTION = r"What does the Python function (?P<call>(?P<name>[\w.]+)\(.*\)) do\?"
# What system and user say in each kind of chat, a line a turn.
ASKED = {
    "word_problem": PROBLEM,
    "tutored_problem": TUTOR + PROBLEM,
    "problem_and_result": PROBLEM + r"\n(?:Give me the number alone\.|So what is the result\?)",
    "problem_grown": PROBLEM + r"\n(?P<growth>And if .*\?)",
    "definition": DEFINE,
    "dictionary_entry": DICTIONARY + r"(?P<word>\w+)",
    "kind_of_word": DEFINE + r"\n(?:What kind of word is it\?|And what kind of word is that\?)",
    "synonym": DEFINE + r"\n(?:Give me another word for it\.|Which other word means the same\?)",
    "word_wanted": r'(?:Which word means|I am looking for a word for|Name a word that means) "(?P<meaning>.*)"[?.]',
    "example": r"(?:Give an example of the word|Show me how the word|Use the word) (?P<word>\w+)(?: is used)?\.",
    "repeat": r"(?:Repeat this sentence|Say after me): " + SENTENCE,
    "capitals": CAPITALS + r"Repeat this sentence: " + SENTENCE,
    "position": r"What is the (?P<place>first|second|third|last) word of this sentence\? " + SENTENCE,
    "count": r"How many words does this sentence have\? " + SENTENCE,
    "contains": r'Does the word "(?P<word>\w+)" occur in this sentence\? ' + SENTENCE,
    "name_put_in": r'Put the name (?P<name>\w+) in place of "(?P<pronoun>She|He)": ' + SENTENCE,
    "order": r"Put these words in alphabetical order: (?P<words>[a-z, ]+)\n(?P<next>.*)",
    "value": r"What is the value of (?P<call>(?:max|min|len|sorted)\(\[(?P<numbers>[\d, ]+)\]\)) in Python\?",
    "manual_function": FUNCTION,
    "function_and_module": FUNCTION + r"\nWhich module is it in\?",
}


def recognised(chat: Chat) -> tuple[str, re.Match[str]]:
    asked = "\n".join(turn["content"] for turn in chat if turn["role"] != "assistant")
    found = [(kind, match) for kind, pattern in ASKED.items() if (match := re.fullmatch(pattern, asked))]
    assert len(found) == 1, (asked, [kind for kind, _ in found])
    return found[0]


def of_kinds(*kinds: str, names: tuple[str, ...] = ("train", "held_out")) -> Iterator[tuple[re.Match[str], list[str]]]:
    """What was asked and what was answered in the chats of these kinds."""
    for name, chat in EVERY_CHAT:
        kind, asked = recognised(chat)
        if kind in kinds and name in names:
            yield asked, [turn["content"] for turn in chat if turn["role"] == "assistant"]


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(GENERATOR))
    yield importlib.import_module("instructions")
    for name in ("instructions", "arithmetic"):
        sys.modules.pop(name, None)


def test_the_form_of_smoltalk():
    for name, lines in ((n, (FOLDER / f"{n}.jsonl").read_text("utf-8").splitlines()) for n in CHATS):
        for line in lines:
            assert list(json.loads(line)) == ["messages"], name
    for _, chat in EVERY_CHAT:
        turns = chat[1:] if chat[0]["role"] == "system" else chat
        assert turns
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        for turn in chat:
            assert list(turn) == ["role", "content"]
            assert turn["content"] == turn["content"].strip() != ""


def test_the_shares_of_the_kinds(generator: ModuleType):
    shares = {make.__name__: share for make, share in generator.KINDS.items()}
    for name, chats in CHATS.items():
        assert Counter(recognised(chat)[0] for chat in chats) == {k: TIMES[name] * share for k, share in shares.items()}
        assert len(chats) == 50 * TIMES[name]
        assert sum(chat[0]["role"] == "system" for chat in chats) == 6 * TIMES[name]
        assert sum(len(chat) == 4 for chat in chats) == 14 * TIMES[name]


@pytest.mark.parametrize("model", ["tiny", "tiny-deepseek"])
def test_every_chat_fits_in_512_tokens(model: str):
    tokenizer = AutoTokenizer.from_pretrained(CALIBRATION.parent / model)
    longest = max(len(tokenizer.apply_chat_template(chat)["input_ids"]) for _, chat in EVERY_CHAT)
    assert 128 < longest <= 512


# Computed answers, computed again

Operands = tuple[int, int, int]
# The words by which a template is known; its numbers in order of reading -> a, b, c; its result; how a grows.
TEMPLATES: list[tuple[str, Callable[..., Operands], Callable[[int, int, int], int], str]] = [
    ("boxes with", lambda a, b, c: (a, b, c), lambda a, b, c: a + b * c, r"had \d+ more \w+ to begin with"),
    ("gives", lambda all_, c, b: (all_ - b * c, b, c), lambda a, b, c: a, r"had \d+ more \w+ to begin with"),
    ("together?", lambda a, b: (a, b, 0), lambda a, b, c: a + a + b, r"had \d+ more \w+"),
    ("pays with", lambda b, c, paid: (paid - b * c, b, c), lambda a, b, c: a, r"paid \$\d+ more"),
    ("an hour", lambda c, b, a: (a, b, c), lambda a, b, c: b * c + a, r"got \$\d+ more for the \w+"),
    (
        "equally",
        lambda all_, c, a: (a, all_ // c, c),
        lambda a, b, c: a + b,
        r"each child had \d+ more \w+ to begin with",
    ),
    ("fence", lambda a, b: (a, b, 0), lambda a, b, c: 2 * (a + b), r"the garden were \d+ feet longer"),
]


def template_of(question: str) -> tuple[Operands, Callable[[int, int, int], int], str]:
    found = [row for row in TEMPLATES if row[0] in question]
    assert len(found) == 1, question
    _, operands, result, growth = found[0]
    return operands(*map(int, re.findall(r"\d+", question))), result, growth


def assert_worked(answer: str, result: int) -> None:
    """Every calculator mark is true and stands where its sum is written out, and the last line has the result."""
    marks = re.findall(r"(\d+)([-+*/])(\d+) = \$?<<\1\2\3=(\d+)>>\4\b", answer)
    assert len(marks) == answer.count("<<") == 2, answer
    for left, sign, right, value in marks:
        exact = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__truediv__}[sign](
            int(left), int(right)
        )
        assert exact == int(value), answer
    assert answer.endswith(f"{result}\n#### {result}") or re.search(rf">>{result}\b.*\n#### {result}\Z", answer), answer


def test_word_problems():
    for asked, answers in of_kinds("word_problem", "tutored_problem", "problem_and_result", "problem_grown"):
        operands, result, _ = template_of(asked["question"])
        assert_worked(answers[0], result(*operands))


def test_results_of_word_problems():
    for asked, answers in of_kinds("problem_and_result"):
        operands, result, _ = template_of(asked["question"])
        assert answers[1] == str(result(*operands))


def test_word_problems_that_grow():
    for asked, answers in of_kinds("problem_grown"):
        (a, b, c), result, growth = template_of(asked["question"])
        assert re.search(growth + r"\?$", asked["growth"]), asked["growth"]
        more = int(re.findall(r"\d+", asked["growth"])[0])
        assert_worked(answers[1], result(a + more, b, c))


def words_of(sentence: str) -> list[str]:
    return re.findall(r"\w+", sentence)


def test_sentences_repeated():
    for asked, (answer,) in of_kinds("repeat"):
        assert answer == asked["sentence"]
    for asked, (answer,) in of_kinds("capitals"):
        assert answer == asked["sentence"].upper() != asked["sentence"]
    for asked, (answer,) in of_kinds("name_put_in"):
        assert re.sub(rf"^{asked['name']}\b", asked["pronoun"], answer) == asked["sentence"]


def test_words_of_sentences():
    for asked, (answer,) in of_kinds("position"):
        words = words_of(asked["sentence"])
        assert answer == {"first": words[0], "second": words[1], "third": words[2], "last": words[-1]}[asked["place"]]
    for asked, (answer,) in of_kinds("count"):
        assert re.findall(r"(\d+) (\w+)[,.]", answer)[:-1] == [
            (str(i), w) for i, w in enumerate(words_of(asked["sentence"]), 1)
        ]
        assert answer.endswith(f". It has {len(words_of(asked['sentence']))} words.")
    said = Counter()
    for asked, (answer,) in of_kinds("contains"):
        assert answer == ("Yes." if asked["word"] in words_of(asked["sentence"].lower()) else "No.")
        said[answer] += 1
    assert min(said.values()) > 4


def test_words_in_order():
    follow_ups = Counter()
    for asked, (first, second) in of_kinds("order"):
        words = asked["words"].split(", ")
        assert len(set(words)) == 4
        assert first.split(", ") == sorted(words)
        longest = [word for word in words if len(word) == max(map(len, words))]
        assert len(longest) == 1
        answers = {
            "Now in reverse order.": ", ".join(sorted(words)[::-1]),
            "Which of them is the longest?": longest[0],
            "Which of them comes first?": sorted(words)[0],
        }
        assert second == answers[asked["next"]]
        follow_ups[asked["next"]] += 1
    assert len(follow_ups) == 3


def test_values_of_python():
    for asked, (answer,) in of_kinds("value"):
        assert answer == repr(eval(asked["call"], {}))


# Answers of a source

KINDS_OF_WORD = {
    "It is a noun.": "noun",
    "It is a verb.": "verb",
    "It is an adjective.": "adj",
    "It is an adverb.": "adv",
}
DICTIONARY_TEXT = (CALIBRATION / "dictionary.txt").read_text("utf-8") + "\n" + held_out_texts()["dictionary"]


def synsets(text: str) -> dict[str, tuple[list[str], str, str]]:
    """What a packaged dictionary text says: a word -> (its synset, kind, gloss)."""
    said = {}
    for line in text.splitlines():
        if entry := re.fullmatch(r"(.+?) \((noun|verb|adj|adv)\): (.+)", line):
            said |= dict.fromkeys(entry[1].split(", "), (entry[1].split(", "), entry[2], entry[3]))
    return said


def definition_in(gloss: str) -> str:
    return re.split(r'; | *"', gloss)[0]


def test_the_packaged_dictionary_says_the_same():
    said, checked = synsets(DICTIONARY_TEXT), Counter()
    for kind in ("definition", "kind_of_word", "synonym", "dictionary_entry", "example", "word_wanted"):
        for asked, answers in of_kinds(kind):
            word = answers[0] if kind == "word_wanted" else asked["word"]
            if word not in said:
                continue
            words, kind_of_word, gloss = said[word]
            checked[kind] += 1
            definition = definition_in(gloss)
            expected = {"dictionary_entry": f"{kind_of_word}: {definition}."}.get(kind, f"{definition}.")
            if kind == "example":
                assert f'"{answers[0]}"' in gloss
            elif kind == "word_wanted":
                assert asked["meaning"] == definition
            else:
                assert answers[0] == expected
            if kind == "synonym":
                assert answers[1] in words
            if kind == "kind_of_word":
                assert KINDS_OF_WORD[answers[1]] == kind_of_word
    assert min(checked.values()) >= 3
    assert sum(checked.values()) > 35


def test_words_are_used_and_not_given_away():
    for asked, (answer,) in of_kinds("example"):
        assert re.search(rf"\b{asked['word']}\b", answer)
    for asked, (answer,) in of_kinds("word_wanted"):
        assert answer not in asked["meaning"]
    for asked, (_, other) in of_kinds("synonym"):
        assert other != asked["word"]


def plain(text: str) -> str:
    """Text of the manual or of a novel without line breaks and markup, for a search of a sentence."""
    text = re.sub(r":[\w:]+:`[~!]?([^`<]*?)(?: <[^`]*>)?`", r"\1", " ".join(text.split()))
    return re.sub(r"[*`]", "", text)


def test_the_packaged_manual_says_the_same():
    manual = plain((CALIBRATION / "manual.txt").read_text("utf-8") + held_out_texts()["manual"])
    checked = 0
    for asked, answers in of_kinds("manual_function", "function_and_module"):
        module, name = asked["name"].rsplit(".", 1)
        directive = plain(f"function:: {name}{asked['call'].removeprefix(asked['name'])}")
        if f"module:: {module} " in manual and directive in manual:
            assert f"{directive} {plain(answers[0])}" in manual
            checked += 1
        if len(answers) == 2:
            assert answers[1] == f"It is in {module}."
    assert checked >= 3


# The splits

SOURCES = {
    "dictionary": ("definition", "kind_of_word", "synonym", "dictionary_entry", "example", "word_wanted"),
    "prose": ("repeat", "capitals", "position", "count", "contains", "name_put_in"),
    "manual": ("manual_function", "function_and_module"),
    "arithmetic": ("word_problem", "tutored_problem", "problem_and_result", "problem_grown"),
}


def taken(domain: str, name: str) -> set[str]:
    """What the chats took of a domain: definitions, sentences, descriptions, problems."""
    texts = set()
    for asked, answers in of_kinds(*SOURCES[domain], names=(name,)):
        fields = asked.groupdict()
        if domain == "dictionary" and "word" in fields and "growth" not in fields:
            texts.add(re.sub(r"^(noun|verb|adj|adv): ", "", answers[0]).rstrip("."))
        else:
            texts.add(fields.get("meaning") or fields.get("sentence") or fields.get("question") or answers[0])
    return texts


def known(domain: str, text: str) -> set[str] | str:
    """The definitions of a dictionary; any other text as it is searched."""
    return {definition_in(gloss) for _, _, gloss in synsets(text).values()} if domain == "dictionary" else plain(text)


@pytest.mark.parametrize("domain", SOURCES)
def test_nothing_held_out_is_trained_on(domain: str):
    held_out, train = taken(domain, "held_out"), taken(domain, "train")
    assert len(held_out) == sum(1 for _ in of_kinds(*SOURCES[domain], names=("held_out",)))
    assert not held_out & train
    calibration = known(domain, (CALIBRATION / f"{domain}.txt").read_text("utf-8"))
    assert [text for text in held_out if text in calibration] == []
    packaged = known(domain, held_out_texts()[domain])
    assert [text for text in train if text in packaged] == []


def test_no_held_out_question_is_asked_elsewhere():
    asked = {
        name: {next(t["content"] for t in c if t["role"] == "user") for c in chats} for name, chats in CHATS.items()
    }
    assert {name: len(questions) for name, questions in asked.items()} == {"train": 600, "held_out": 150}
    assert not asked["train"] & asked["held_out"]
    calibration = (CALIBRATION / "chat.jsonl").read_text("utf-8").splitlines()
    said = {turn["content"] for line in calibration for turn in json.loads(line)["messages"]}
    assert not asked["held_out"] & said
    assert not asked["train"] & {problem["question"] for problem in held_out_problems()}


def test_held_out_words_are_not_taught():
    words = {name: {a["word"] for a, _ in of_kinds(*SOURCES["dictionary"][:-1], names=(name,))} for name in CHATS}
    words["held_out"] |= {answer for _, (answer,) in of_kinds("word_wanted", names=("held_out",))}
    assert not words["train"] & words["held_out"]
    assert not words["held_out"] & set(synsets((CALIBRATION / "dictionary.txt").read_text("utf-8")))
    assert not words["train"] & set(synsets(held_out_texts()["dictionary"]))


@pytest.mark.parametrize("name", CHATS)
def test_operands_are_of_the_split(name: str, generator: ModuleType):
    for asked, _ in of_kinds(*SOURCES["arithmetic"], names=(name,)):
        (a, b, _c), _, _ = template_of(asked["question"])
        assert generator.is_held_out(a, b) == (name == "held_out")
        if growth := asked.groupdict().get("growth"):
            assert generator.is_held_out(a + int(re.findall(r"\d+", growth)[0]), b) == (name == "held_out")
    for asked, _ in of_kinds("value", names=(name,)):
        assert generator.is_held_out(*map(int, asked["numbers"].split(", ")[:2])) == (name == "held_out")
