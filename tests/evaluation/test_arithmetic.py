"""Word problems: the packaged ones, their generator, and exact answers."""

import importlib.util
import re
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from namex_hf.evaluation.arithmetic import exact_answers, final_number, held_out_problems
from namex_hf.evaluation.perplexity import held_out_texts
from namex_hf.evaluation.speed import speed

GENERATOR = Path(__file__).parents[2] / "namex_hf" / "evaluation" / "problems" / "templates.py"
MARK = re.compile(r"(\S+?) = \$?<<([^=<>]+)=([^<>]+)>>(\S+)")
OPERATION = re.compile(r"(\d+)([-+*/])(\d+)")


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("packaged_arithmetic", GENERATOR)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def value(operation: str) -> int:
    """The result of ``a+b``, ``a-b``, ``a*b`` or of ``a/b`` without a rest."""
    match = OPERATION.fullmatch(operation)
    assert match is not None, operation
    a, sign, b = int(match[1]), match[2], int(match[3])
    if sign == "/":
        assert a % b == 0, operation
        return a // b
    return {"+": a + b, "-": a - b, "*": a * b}[sign]


def assert_right(answer: str) -> None:
    """Every mark of a worked answer computes, says what the text says, and the last is the answer."""
    marks = MARK.findall(answer)
    assert len(marks) == answer.count("<<") == 2
    for said, operation, result, written in marks:
        assert said == operation
        assert value(operation) == int(result) == int(written.rstrip("."))
    assert final_number(answer) == marks[-1][2]
    assert answer.splitlines()[-1] == f"#### {marks[-1][2]}"


def test_packaged_problems_are_right():
    problems = held_out_problems()
    assert len(problems) >= 100
    for problem in problems:
        assert set(problem) == {"question", "answer"}
        assert_right(problem["answer"])
    assert len({problem["question"] for problem in problems}) > 0.9 * len(problems)


def test_problems_in_the_held_out_text_are_right():
    parts = re.split(r"\n\n(?=Question: )", held_out_texts()["arithmetic"].strip())
    assert len(parts) > 100
    for part in parts:
        _, answer = part.removeprefix("Question: ").split("\nAnswer: ")
        assert_right(answer)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), held_out=st.booleans())
def test_no_operands_are_in_both_splits(generator: ModuleType, seed: int, held_out: bool):
    drawn: list[tuple[int, int]] = []

    def keep(name: str, item: str, a: int, b: int, c: int) -> tuple[str, str]:
        drawn.append((a, b))
        return "", ""

    kept, generator.TEMPLATES = generator.TEMPLATES, (keep,)
    try:
        assert len(list(generator.problems(50, seed, held_out))) == len(drawn) == 50
    finally:
        generator.TEMPLATES = kept
    assert all(generator.is_held_out(a, b) == held_out for a, b in drawn)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), held_out=st.booleans())
def test_generated_problems_are_right(generator: ModuleType, seed: int, held_out: bool):
    for _, answer in generator.problems(40, seed, held_out):
        assert_right(answer)


def test_packaged_questions_are_made_of_held_out_operands_and_of_no_others(generator: ModuleType):
    """All questions that the templates can make, up to names and items, by the split of their operands."""

    def bare(question: str) -> str:
        words = {*generator.NAMES.split(), *generator.ITEMS.split()}
        return " ".join("_" if word.strip(".,?") in words else word for word in question.split())

    asked = {bare(problem["question"]) for problem in held_out_problems()}
    made: dict[bool, set[str]] = {True: set(), False: set()}
    for a, b, c in product(range(2, 61), range(2, 13), range(2, 10)):
        questions = {bare(template("Anna", "books", a, b, c)[0]) for template in generator.TEMPLATES}
        made[generator.is_held_out(a, b)] |= questions
    assert asked <= made[True]
    assert not asked & made[False]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is 3.\n#### 12", "12"),
        ("#### 1,234", "1234"),
        ("####-7 apples", "-7"),
        ("#### 5\n#### 6", "5"),
        ("####\n8", "8"),
        ("no answer 12", None),
        ("#### none", None),
        ("### 4", None),
        ("", None),
    ],
)
def test_final_number(text: str, number: str | None):
    assert final_number(text) == number


def test_exact_answers_of_a_random_model_are_booleans(model: Any, tokenizer: Any):
    found = exact_answers(model, tokenizer, held_out_problems()[:3], batch=2, new_tokens=8)
    assert len(found) == 3
    assert all(type(one) is bool for one in found)


def test_exact_answers_reads_what_is_generated(tokenizer: Any):
    problems = [{"question": f"How much is {n} and 1?", "answer": f"#### {n + 1}"} for n in (1, 20, 300)]

    class Knowing(torch.nn.Module):
        """Answers 2 to everything, and is asked in rows padded on the left."""

        device = torch.device("cpu")
        prompts: list[str] = []  # noqa: RUF012

        def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
            assert options["do_sample"] is False
            assert not self.training
            assert attention_mask[:, -1].all()
            self.prompts += tokenizer.batch_decode(input_ids, skip_special_tokens=True)
            said = tokenizer(["<<1+1=2>>\n#### 2"] * len(input_ids), return_tensors="pt").input_ids
            return torch.cat([input_ids, said], dim=1)

    model = Knowing()
    assert exact_answers(model, tokenizer, problems, batch=2) == [True, False, False]
    assert model.training
    assert model.prompts == [f"Question: {problem['question']}\nAnswer:" for problem in problems]


@pytest.mark.parametrize("asked", [True, False])
def test_the_balance_loss_stays_out_of_generation(model, tokenizer, asked, monkeypatch):
    """transformers' Qwen2-MoE fails where a cached pass is to have one; the configuration stays as it is."""
    monkeypatch.setattr(model.config, "output_router_logits", asked)
    assert len(exact_answers(model, tokenizer, held_out_problems()[:2], new_tokens=3)) == 2
    assert speed(model, torch.arange(5, 45), batch=2, prompt=6, new=3, repeats=1).decode > 0
    assert model.config.output_router_logits is asked


@pytest.mark.parametrize("chat", [True, False])
def test_text_begins_once(model: Any, tokenizer: Any, chat: bool):
    """A chat template writes the begin of text itself; plain questions get it from the tokenizer."""
    begin = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.pad_token = "!"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", begin)]
    )
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    given: list[torch.Tensor] = []
    inner = model.get_input_embeddings()
    hook = inner.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    problems = [{"question": "one?", "answer": "#### 1"}, {"question": "and two?", "answer": "#### 2"}]
    exact_answers(model, tokenizer, problems, new_tokens=1, chat=chat)
    hook.remove()
    assert (given[0] == begin).sum(1).tolist() == [1, 1]
