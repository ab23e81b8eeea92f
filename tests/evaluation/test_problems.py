"""Kinds of problems: what their checks take for right, their seeds, their lengths."""

import ast
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from namex_hf.checkpoint.resolve import resolve
from namex_hf.defaults import KINDS
from namex_hf.evaluation.arithmetic import held_out_problems
from namex_hf.evaluation.generation import as_chat
from namex_hf.evaluation.problems import chats, code, copying, definitions, lookup, tools
from namex_hf.evaluation.problems.kinds import ALL
from namex_hf.evaluation.problems.problem import SEEDS, Problem
from namex_hf.evaluation.problems.templates import TEMPLATES

GENERATED = ("arithmetic", "copying", "lookup", "tools")
FINITE = {"definitions": 400, "code": 300, "chats": 60}
"""Kinds made of packaged files, and how many problems each seed has of them at least."""


def test_every_kind_can_be_named():
    assert tuple(ALL) == KINDS
    assert {*GENERATED, *FINITE, "packaged"} == {*KINDS}


@pytest.mark.parametrize("kind", [*GENERATED, *FINITE])
def test_seeds_have_no_problem_in_common(kind: str):
    """The same seed gives the same problems, each once; a larger number adds to them."""
    made = {name: ALL[kind].make(seed, 150) for name, seed in SEEDS.items()}
    assert made["tables"] == ALL[kind].make(SEEDS["tables"], 150)
    assert ALL[kind].make(SEEDS["tables"], 20) == made["tables"][:20]
    for problems in made.values():
        assert len(set(problems)) == len(problems) >= min(150, FINITE.get(kind, 150))
    assert not {one.prompt for one in made["tables"]} & {one.prompt for one in made["choices"]}


@pytest.mark.parametrize("kind", KINDS)
def test_the_stated_answer_is_right_and_others_are_wrong(kind: str):
    problems = ALL[kind].make(2, 60)
    for problem in problems:
        assert ALL[kind].check(problem.answer, problem)
        assert not ALL[kind].check("", problem)
    others = [ALL[kind].check(after.answer, before) for before, after in pairwise(problems)]
    assert sum(others) < 0.2 * len(others)


@pytest.mark.parametrize("kind", FINITE)
def test_a_finite_kind_gives_what_it_has(kind: str):
    both = [ALL[kind].make(seed, 10**6) for seed in (1, 2)]
    assert min(map(len, both)) >= FINITE[kind]


def test_a_thousand_of_each_generated_kind():
    assert [len(ALL[kind].make(2, 1000)) for kind in GENERATED] == [1000] * 4
    assert [one.answer for one in ALL["packaged"].make(2, 3)] == [one["answer"] for one in held_out_problems()[:3]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(resolve("tiny").folder)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_asked_has_at_most_500_tokens_and_right_answers_fit(kind: str, tokenizer: Any):
    lengths = []
    for problem in ALL[kind].make(2, 200):
        text = as_chat(tokenizer, problem.turns) if problem.turns else problem.prompt
        lengths.append(len(tokenizer(text).input_ids))
        answer = problem.answer.split(", ")[0] if kind == "definitions" else problem.answer
        assert len(tokenizer(answer).input_ids) < ALL[kind].NEW_TOKENS
    assert max(lengths) <= (700 if kind == "code" else 500)
    assert max(lengths) > 400 or kind not in ("copying", "lookup")


def test_arithmetic_is_made_of_all_templates():
    questions = [one.prompt for one in ALL["arithmetic"].make(2, 300)]
    endings = {template("Anna", "books", 2, 3, 4)[0].rpartition(". ")[2].split()[1] for template in TEMPLATES}
    assert {question.rpartition(". ")[2].split()[1] for question in questions} >= endings


def problem(answer: str, prompt: str = "") -> Problem:
    return Problem(prompt, answer)


@pytest.mark.parametrize(
    ("answer", "right"),
    [(" winter melon\n", True), ("Melon.\nWord", True), ("melons", False), ("a melon", False), ("\n", False)],
)
def test_any_word_of_the_entry(answer: str, right: bool):
    assert definitions.check(answer, problem("melon, winter melon")) is right


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" x + f(1, 'a')", True),
        (' x+f( 1,"a" )  # a comment\n    more', True),
        (" x + f(1, 'b')", False),
        (" x + f(1, 'a'); g()", False),
        (" x + f(1, 'a'", False),
        (" \0", False),
        ("(" * 5000, False),
        (" '\\d'", False),
    ],
)
def test_code_is_compared_by_its_tree(answer: str, right: bool):
    asked = problem(" x + f(1, 'a')", "def f():\n    y = 2\n    return")
    assert code.check(answer, asked) is right


def test_an_answer_is_never_run(tmp_path: Path):
    """One that would write a file, whether it is right or wrong; no check names a function that runs text."""
    line = f"x = open({str(tmp_path / 'written')!r}, 'w').write('x')"
    for right in (line, "x = 1"):
        asked = problem(right.removeprefix("x ="), "x =")
        assert code.check(line.removeprefix("x ="), asked) is (right == line)
    assert not list(tmp_path.iterdir())
    for file in Path(code.__file__).parent.glob("*.py"):
        names = {node.id for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Name)}
        assert not names & {"exec", "eval", "compile", "__import__", "importlib", "subprocess", "os"}


@pytest.mark.parametrize(
    ("answer", "right"), [(" one two\n", True), ("one  two", True), ("one two three", False), ("one", False)]
)
def test_a_copy_is_the_rest_of_the_line(answer: str, right: bool):
    assert copying.check(answer, problem("one two")) is right


@pytest.mark.parametrize(("answer", "right"), [(" 412\nx: 3", True), ("412", True), ("4123", False), ("412.", False)])
def test_a_number_looked_up(answer: str, right: bool):
    assert lookup.check(answer, problem("412")) is right


@pytest.mark.parametrize(
    ("stated", "answer", "right"),
    [
        ("It is a noun.", "it is  a noun", True),
        ("It is a noun.", "It is a verb.", False),
        ("2+3 = <<2+3=5>>5.\n#### 5", "#### 5", True),
        ("2+3 = <<2+3=5>>5.\n#### 5", "2+3 = <<2+3=5>>5.", False),
    ],
)
def test_the_answer_of_a_chat(stated: str, answer: str, right: bool):
    assert chats.check(answer, problem(stated)) is right


CALL = {"name": "set_timer", "arguments": {"minutes": 1, "label": "books"}}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (json.dumps(CALL), True),
        (f"<tool_call>\n{json.dumps(CALL, indent=1)}\n</tool_call>", True),
        ('{"arguments": {"label": "books", "minutes": 1}, "name": "set_timer", "id": 7}', True),
        (json.dumps({**CALL, "name": "get_weather"}), False),
        (json.dumps({**CALL, "arguments": {"minutes": 1}}), False),
        (json.dumps({**CALL, "arguments": {**CALL["arguments"], "more": 1}}), False),
        (json.dumps(CALL).replace("1", "true"), False),
        (json.dumps(CALL).replace("1", '"1"'), False),
        (json.dumps(CALL)[:-1], False),
        ("{" * 100000, False),
        ('{"a":' * 100000, False),
        ("set_timer(1)", False),
    ],
)
def test_name_and_arguments_of_a_call(answer: str, right: bool):
    assert tools.check(answer, problem(json.dumps(CALL))) is right
