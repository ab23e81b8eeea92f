"""`examples/choose_response.py`: gains and the bargain by value, and the program itself."""

import math
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from namex_hf.checkpoint.resolve import PACKAGED
from namex_hf.errors import NamexError
from namex_hf.evaluation.loading import load


@pytest.fixture(scope="module")
def example() -> Any:
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "examples" / "choose_response.py")))


def test_gains_and_a_model_over_its_limit(example):
    likelihoods = torch.tensor([[0.8, 0.5, 0.1], [0.4, 0.6, 0.2], [0.9, 0.9, 0.9]])
    found = example.gains(likelihoods, [2.5, 10.0, 9.0], 10.0)
    assert found.tolist() == [
        pytest.approx([0.8, 0.75, 0.3], abs=1e-6),
        [0.0, 0.0, 0.0],  # at its limit: the disagreement value
        pytest.approx([0.9, 0.1, 0.9], abs=1e-6),
    ]
    assert example.latency_gain(11.0, 10.0) == 0


def test_models_alike_share_one_vote_and_a_late_one_has_none(example):
    """K a = 1 / a by hand: the first two solve 2 a = 1 / a, the third a / 4 = 1 / a."""
    tau = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    weights, utilities = example.bargain(tau)
    assert weights.tolist() == pytest.approx([math.sqrt(0.5), math.sqrt(0.5), 2.0, 0.0])
    assert utilities.tolist() == pytest.approx([math.sqrt(2), math.sqrt(2), 0.5, 0.0])
    said = example.why(["a", "b", "c", "d"], tau, torch.tensor([1.5, 1.0, 0.5, 0.0]), 3.0).splitlines()
    assert said[0].startswith("chosen: a, ")
    assert said[0].endswith("1.500 times that of b")
    assert said[1] == "it is the best in: quality"
    assert said[2] == "over the limit of 3 s, so at its disagreement value, without a vote: d"
    with pytest.raises(NamexError, match="no model answered within --limit; accepted: a longer limit"):
        example.bargain(torch.zeros(3, 3, dtype=torch.float64))


def test_likelihood_is_that_of_the_answer_alone(example):
    """Against the loss of transformers, which leaves out labels of -100."""
    model, tokenizer = load(PACKAGED / "tiny"), AutoTokenizer.from_pretrained(PACKAGED / "tiny")
    prompt, answer = "Question: Anna has 14 apples.\nAnswer:", " Anna has 14 apples."
    ids = tokenizer(prompt + answer, return_tensors="pt").input_ids
    labels = ids.clone()
    labels[:, : len(tokenizer(prompt).input_ids)] = -100
    with torch.no_grad():
        expected = math.exp(-float(model(input_ids=ids, labels=labels).loss))
    assert 0.01 < expected < 0.99
    assert example.likelihood(model, tokenizer, prompt, answer) == pytest.approx(expected, rel=1e-5)
    assert example.likelihood(model, tokenizer, prompt, "") == 0


def test_the_program_chooses_one_of_three_and_says_why(example, tmp_path, capsys):
    example.main(["--output_dir", str(tmp_path), "--tokens", "3", "--limit", "1000"])
    printed = capsys.readouterr().out
    names = ("tiny", "tiny-deepseek", str(tmp_path / "tiny-namex-full"))
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.startswith(names)}
    assert set(rows) == set(names)
    for *gains, weight, utility in rows.values():
        assert all(0 < float(gain) <= 1 for gain in gains)
        assert float(weight) * float(utility) == pytest.approx(1, abs=0.01)  # the bargaining equation
    best = max(rows, key=lambda name: float(rows[name][-1]))
    others = [float(cells[-1]) for name, cells in rows.items() if name != best]
    if float(rows[best][-1]) > max(others):  # not a tie at three digits
        assert f"\nchosen: {best}, " in printed
    assert (tmp_path / "tiny-namex-full" / "config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--models", "tiny"], "argument --models: found tiny; accepted: two or more, each once"),
        (["--models", "tiny", "tiny"], "accepted: two or more, each once"),
        (["--limit", "nan"], "found --limit nan, --tokens 60, a prompt of "),
    ],
)
def test_refused_in_one_line(example, capsys, arguments, text):
    with pytest.raises(SystemExit) as ended:
        example.main(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert text in said
    assert len(said.splitlines()) == 1
