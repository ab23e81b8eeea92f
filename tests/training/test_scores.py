"""What is measured, the figures of it, and what may be said of two models."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap

from namex_hf.evaluation.perplexity import IGNORED, held_out_texts
from namex_hf.evaluation.statistics import MEASURES, TEXT_TOKENS, difference, differs, value
from namex_hf.training.scores import measure, verdict
from tests.helpers.toy_models import COMMON, toy_model, toy_tokenizer

LOSSES = ("chats", "text")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
some_losses = st.lists(st.floats(0, 12), min_size=2, max_size=12)


@st.composite
def two_models(draw: st.DrawFn, groups: int = 3) -> tuple[list[list[float]], list[list[float]]]:
    """Losses of the same items under two models."""
    one = [draw(some_losses) for _ in range(draw(st.integers(1, groups)))]
    other = [draw(st.lists(st.floats(0, 12), min_size=len(group), max_size=len(group))) for group in one]
    return one, other


def mean_of_means(groups: list[list[float]]) -> float:
    return float(np.mean([np.mean(group) for group in groups]))


# Figures


@settings(deadline=None)
@given(groups=st.lists(st.lists(st.floats(0, 12), min_size=1, max_size=9), min_size=1, max_size=5))
def test_a_perplexity_is_the_geometric_mean_over_groups(groups: list[list[float]]):
    each = [math.exp(np.mean(group)) for group in groups]
    for name in LOSSES:
        assert value(name, groups) == pytest.approx(math.prod(each) ** (1 / len(each)), rel=1e-9)


def test_answers_are_in_per_cent():
    assert value("problems", [[1.0, 0.0, 0.0, 1.0, 1.0]]) == pytest.approx(60)
    assert value("problems", [[0.0] * 7]) == 0


@settings(deadline=None, max_examples=25)
@given(models=two_models(), name=st.sampled_from(LOSSES))
def test_a_difference_of_perplexities_is_their_ratio(models, name: str):
    one, other = models
    found, turned = difference(name, one, other), difference(name, other, one)
    assert found["value"] == pytest.approx(value(name, one) / value(name, other), rel=1e-4)
    assert found["value"] == pytest.approx(math.exp(mean_of_means(one) - mean_of_means(other)), rel=1e-4)
    assert found["low"] <= found["value"] * (1 + 1e-5)
    assert found["value"] <= found["high"] * (1 + 1e-5)
    for name_of, opposite in (("value", "value"), ("low", "high"), ("high", "low")):
        assert found[name_of] * turned[opposite] == pytest.approx(1, rel=1e-4)
    assert differs(name, found) == differs(name, turned)


@settings(deadline=None, max_examples=25)
@given(answers=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=30))
def test_a_difference_of_answers_is_in_points(answers: list[tuple[bool, bool]]):
    one, other = ([[float(pair[side]) for pair in answers]] for side in (0, 1))
    found = difference("problems", one, other)
    points = 100 * (sum(one[0]) - sum(other[0])) / len(answers)
    assert found["value"] == pytest.approx(points, abs=1e-4)
    assert found["value"] == pytest.approx(value("problems", one) - value("problems", other), abs=1e-4)
    assert found["low"] - 1e-4 <= points <= found["high"] + 1e-4


@pytest.mark.parametrize("name", MEASURES)
def test_the_interval_is_scipys(name: str):
    """Of pairs: how hard an item is for both models is no noise of their difference."""
    draw = np.random.default_rng(4)
    hard = draw.uniform(0, 8, size=40)
    one, other = (hard + 0.1 * draw.normal(size=40) + shift for shift in (0.05, 0.0))
    found = difference(name, [one.tolist()], [other.tolist()])
    expected = bootstrap(
        (one - other,), np.mean, n_resamples=9999, confidence_level=0.95, method="percentile", rng=1
    ).confidence_interval
    form = (lambda x: 100 * x) if name == "problems" else math.exp
    width = form(expected.high) - form(expected.low)
    assert found["low"] == pytest.approx(form(expected.low), abs=0.05 * width)
    assert found["high"] == pytest.approx(form(expected.high), abs=0.05 * width)
    assert found["value"] == pytest.approx(form((one - other).mean()), rel=1e-4)


def test_every_group_is_resampled_by_itself():
    """Its size is no weight of a group, and what differs between groups is no noise."""
    groups = [[1.0] * 50, [3.0] * 2]
    found = difference("text", groups, [[0.0] * 50, [0.0] * 2])
    assert [found[name] for name in ("low", "value", "high")] == pytest.approx([math.exp(2)] * 3)


@given(groups=st.lists(some_losses, min_size=1, max_size=3))
@settings(deadline=None, max_examples=10)
def test_a_model_does_not_differ_from_itself(groups: list[list[float]]):
    for name, alike in (("chats", 1.0), ("problems", 0.0)):
        found = difference(name, groups, groups)
        assert found == {"value": alike, "low": alike, "high": alike}
        assert not differs(name, found)


@pytest.mark.parametrize(
    ("name", "low", "high", "expected"),
    [
        ("chats", 0.9, 1.1, False),
        ("chats", 1.0, 1.1, False),
        ("text", 0.9, 1.0, False),
        ("text", 1.001, 1.1, True),
        ("text", 0.9, 0.999, True),
        ("chats", -0.1, 0.1, True),
        ("problems", -0.1, 0.1, False),
        ("problems", 0.0, 3.0, False),
        ("problems", 0.9, 1.1, True),
        ("problems", -3.0, -0.5, True),
    ],
)
def test_what_differs(name: str, low: float, high: float, expected: bool):
    assert differs(name, {"value": (low + high) / 2, "low": low, "high": high}) is expected


# Sentences

WORSE = {"value": 1.25, "low": 1.1, "high": 1.5}
ALIKE = {"value": 1.0, "low": 0.9, "high": 1.1}
FEWER = {"value": -4.5, "low": -7.0, "high": -2.0}
MORE = {"value": 4.5, "low": 2.0, "high": 7.0}
AS_MANY = {"value": 0.5, "low": -2.0, "high": 3.0}
SENTENCES = [
    ({"chats": ALIKE}, "a and b do not differ beyond the noise of the items (chats)."),
    (
        {"chats": ALIKE, "text": ALIKE, "problems": AS_MANY},
        "a and b do not differ beyond the noise of the items (chats, text, problems).",
    ),
    ({"chats": WORSE}, "Against b, a has 1.2500 times its perplexity on chats (1.1000 to 1.5000)."),
    (
        {"problems": FEWER},
        "Against b, a answers -4.5 points of problems exactly (-7.0 to -2.0).",
    ),
    (
        {"chats": WORSE, "text": ALIKE, "problems": MORE},
        "Against b, a has 1.2500 times its perplexity on chats (1.1000 to 1.5000) and answers +4.5 points of problems "
        "exactly (+2.0 to +7.0); by text they do not differ beyond the noise of the items.",
    ),
    (
        {"chats": ALIKE, "text": WORSE, "problems": AS_MANY},
        "Against b, a has 1.2500 times its perplexity on text (1.1000 to 1.5000); by chats, problems they do not "
        "differ beyond the noise of the items.",
    ),
]


@pytest.mark.parametrize(("found", "sentence"), SENTENCES)
def test_verdicts(found: dict[str, dict[str, float]], sentence: str):
    assert verdict("a", "b", found) == sentence


@settings(deadline=None, max_examples=15)
@given(models=two_models(groups=1))
def test_a_verdict_names_every_measure_once(models):
    found = {name: difference(name, *models) for name in MEASURES}
    said = verdict("a", "b", found)
    assert all(said.count(name) == 1 for name in MEASURES)
    assert ("Against b" in said) == any(differs(name, what) for name, what in found.items())


# Measuring


@pytest.fixture(scope="module")
def model() -> Any:
    """Random; every token ends its answers, which would go on for long otherwise."""
    made = toy_model()
    made.generation_config.eos_token_id = list(range(COMMON["vocab_size"]))
    return made


@pytest.fixture
def tokenizer() -> Any:
    made = toy_tokenizer()
    made.chat_template = TEMPLATE
    made.padding_side = "right"
    return made


@torch.no_grad()
def losses(model: Any, ids: list[int]) -> torch.Tensor:
    """Of every token but the first."""
    scores = model(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return -scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_every_measure_item_by_item(model: Any, tokenizer: Any):
    ids = [list(range(40, 60)), list(range(100, 107))]
    rows = [{"input_ids": one, "labels": [*[IGNORED] * 4, *one[4:]]} for one in ids]
    found = measure(model, tokenizer, rows, list(MEASURES))
    assert list(found) == list(MEASURES)
    assert found["chats"] == [pytest.approx([float(losses(model, one)[3:].mean()) for one in ids], rel=1e-5)]
    texts = list(held_out_texts().values())
    assert [len(group) for group in found["text"]] == [TEXT_TOKENS // 256] * len(texts)
    for group, text in zip(found["text"], texts, strict=True):
        window = tokenizer(text)["input_ids"][256:512]
        assert group[1] == pytest.approx(float(losses(model, window).mean()), rel=1e-5)
    assert found["problems"] == [[0.0] * 200]
    assert tokenizer.padding_side == "right"  # answers are generated with another
    assert not model.training


def test_only_what_was_asked_for(model: Any, tokenizer: Any):
    assert measure(model, tokenizer, [], ()) == {}
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}]
    assert list(measure(model, tokenizer, rows, ["chats"])) == ["chats"]


def test_chats_of_a_tokenizer_without_padding(model: Any, tokenizer: Any):
    rows = [{"input_ids": list(range(length)), "labels": list(range(length))} for length in (3, 9)]
    padded = measure(model, tokenizer, rows, ["chats"])
    tokenizer.pad_token = None
    assert measure(model, tokenizer, rows, ["chats"])["chats"] == [pytest.approx(padded["chats"][0], rel=1e-5)]
