"""The losses of stage 1 against plain loops, and a student that learns by them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from namex_hf.merging.routers import assignment, overlap
from namex_hf.merging.routing import TokenRouting
from namex_hf.training.stable_moe.student import Student, balance_loss, distillation_loss

SHAPES = st.tuples(st.integers(1, 12), st.integers(2, 6)).flatmap(
    lambda shape: st.tuples(st.just(shape[0]), st.just(shape[1]), st.integers(1, shape[1]))
)


def random_logits(tokens: int, experts: int, seed: int) -> torch.Tensor:
    return 2 * torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))


def best(row: list[float], top_k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda expert: -row[expert])[:top_k]


def balance_by_hand(logits: list[list[float]], top_k: int) -> float:
    """The formula as it is written, an expert at a time."""
    experts = len(logits[0])
    mean = len(logits) * top_k / experts
    total = 0.0
    for expert in range(experts):
        own = [row[expert] for row in logits if expert in best(row, top_k)]
        total += (len(own) - mean) / mean * sum(1 / (1 + math.exp(-logit)) for logit in own)
    return total / len(logits)


def distillation_by_hand(student: list[list[float]], logits: list[list[float]], top_k: int) -> float:
    total = 0.0
    for own, row in zip(student, logits, strict=True):
        whole = math.log(sum(map(math.exp, own)))
        total -= sum((own[expert] - whole) / top_k for expert in best(row, top_k))
    return total / len(logits)


@settings(deadline=None, max_examples=60)
@given(SHAPES, st.integers(0, 10**6))
def test_the_losses_are_what_plain_loops_give(shape, seed):
    tokens, experts, top_k = shape
    logits, own = random_logits(tokens, experts, seed), random_logits(tokens, experts, seed + 1)
    assert float(balance_loss(logits, top_k)) == pytest.approx(balance_by_hand(logits.tolist(), top_k), abs=1e-5)
    expected = distillation_by_hand(own.tolist(), logits.tolist(), top_k)
    assert float(distillation_loss(own, logits, top_k)) == pytest.approx(expected, abs=1e-5)


@settings(deadline=None, max_examples=40)
@given(SHAPES, st.integers(0, 10**6))
def test_the_balance_loss_lowers_the_overloaded_and_raises_the_others(shape, seed):
    tokens, experts, top_k = shape
    logits = random_logits(tokens, experts, seed).requires_grad_()
    balance_loss(logits, top_k).backward()
    chosen = torch.zeros(tokens, experts).scatter_(1, logits.detach().topk(top_k).indices, 1)
    excess = chosen.sum(0) * experts - tokens * top_k
    assert logits.grad is not None
    assert torch.equal(logits.grad.sign(), excess.sign() * chosen)  # a step goes against it
    torch.testing.assert_close(balance_loss(torch.cat([logits, logits]), top_k), balance_loss(logits, top_k))


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 6), st.integers(1, 3), st.data())
def test_the_balance_loss_of_a_balanced_load_is_zero(experts, rounds, data):
    top_k = data.draw(st.integers(1, experts))
    ranks = torch.arange(experts * rounds)[:, None] + torch.arange(experts)
    logits = (ranks % experts).float().requires_grad_()
    loss = balance_loss(logits, top_k)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_with_one_expert_a_token_the_distillation_is_stable_moes():
    logits, own = random_logits(50, 7, 0).requires_grad_(), random_logits(50, 7, 1).requires_grad_()
    loss = distillation_loss(own, logits, 1)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(own, logits.argmax(1)))
    loss.backward()
    assert logits.grad is None  # the router does not learn from its student
    assert own.grad.abs().sum() > 0


def test_the_distillation_has_no_gradient_where_the_student_has_the_shares_of_the_choices():
    """The minimum that `namex_hf.merging.routers.assignment` stands for: of one id, 6 of 12 choices, 3, 2, 1."""
    choices = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 2], [0, 2], [0, 3]])
    logits = torch.zeros(6, 4).scatter_(1, choices, 1.0)
    student = torch.tensor([6.0, 3.0, 2.0, 1.0]).log().requires_grad_()
    distillation_loss(student.expand(6, 4), logits, 2).backward()
    torch.testing.assert_close(student.grad, torch.zeros(4), atol=1e-6, rtol=0)


def test_the_student_finds_by_descent_what_counting_finds():
    """Ids have experts of their own, which context overrules in a part of their tokens."""
    torch.manual_seed(0)
    layers, vocabulary, experts, top_k, tokens = 2, 30, 8, 2, 4000
    taste = 3 * torch.randn(layers, vocabulary, experts)
    ids = torch.randint(0, vocabulary - 5, (tokens,))
    logits = taste[:, ids] + torch.randn(layers, tokens, experts)
    student = Student(layers, vocabulary, experts, top_k, width=6)
    optimiser = torch.optim.Adam(student.parameters(), lr=0.05)

    def agree() -> list[float]:
        own = student.choose(ids)
        return [float(overlap(logits[layer].topk(top_k).indices, own[layer]).mean()) for layer in range(layers)]

    start = agree()
    for some in torch.randperm(tokens).view(-1, 100).repeat(6, 1):
        optimiser.zero_grad()
        own = student(ids[some])
        sum(distillation_loss(own[layer], logits[layer, some], top_k) for layer in range(layers)).backward()
        optimiser.step()
    end = agree()
    for layer in range(layers):
        value, index = logits[layer].softmax(-1).topk(top_k)
        counted = assignment(ids, TokenRouting(index, value), experts, vocabulary).long()
        most = float(overlap(index, counted[ids]).mean())  # that any table of these ids could have
        assert start[layer] < 0.5 * most < 0.97 * most < end[layer] <= most + 1e-6
        seen = torch.arange(vocabulary - 5)
        assert overlap(counted[seen], student.choose(seen)[layer]).mean() > 0.9


def test_the_student_sees_the_id_alone_and_layers_differ():
    student = Student(2, 11, 5, 3)
    assert student.tokens.shape == (11, 2, 50)
    ids = torch.tensor([4, 9, 4])
    logits = student(ids)
    assert logits.shape == (2, 3, 5)
    for layer in range(2):
        torch.testing.assert_close(logits[layer], student.tokens[ids, layer] @ student.experts[layer].T)
    assert torch.equal(student.choose(ids), logits.topk(3).indices)
    assert student.choose(ids[:0]).shape == (2, 0, 3)
