"""The fit of the router: its error and gradient are those of the experts themselves, and it finds planted rows."""

import numpy as np
import pytest
import torch
from torch.nn.functional import silu

from namex_hf.merging.gate import Gate
from namex_hf.merging.moe_layer import MoELayer
from namex_hf.merging.router_fit import OutputProducts, RouterFit, RouterProblem, fit_router, output_products
from namex_hf.merging.routing import expert_output, gate_values, route
from namex_hf.merging.settings import FitSettings
from tests.helpers.mixtures import HIDDEN, draws, expert_at, random_experts, random_tokens
from tests.helpers.reference import answers64, double, gates64, output64

EXPERTS, TOP_K, TOKENS = 5, 2, 600
MODELS = random_experts(EXPERTS, 0)
INPUTS = random_tokens(TOKENS, 0)
LAYER = MoELayer(MODELS, torch.zeros(EXPERTS, HIDDEN), Gate(TOP_K, False), silu)
HELD_OUT = torch.arange(TOKENS) % 4 == 0


def rows(seed: int) -> torch.Tensor:
    return torch.randn(EXPERTS, HIDDEN, generator=draws(seed))


def output(router: torch.Tensor, renormalises: bool = False) -> torch.Tensor:
    return torch.from_numpy(output64(INPUTS, route(INPUTS, router, Gate(TOP_K, renormalises)), MODELS)).float()


def known(wanted: torch.Tensor) -> OutputProducts:
    return output_products(INPUTS, wanted, LAYER)


def fit(data: OutputProducts, start: torch.Tensor, steps: int, seed: int = 0, renormalises: bool = False) -> RouterFit:
    return fit_router(RouterProblem(INPUTS, data, HELD_OUT, Gate(TOP_K, renormalises)), start, steps, seed)


def error(router: torch.Tensor, wanted: torch.Tensor, held_out: torch.Tensor = HELD_OUT) -> float:
    """On the held-out tokens, from whole outputs."""
    missed = output64(INPUTS, route(INPUTS, router, Gate(TOP_K, False)), MODELS) - double(wanted)
    return float((missed[held_out] ** 2).sum() / (double(wanted)[held_out] ** 2).sum())


# --- the error -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [1, 70 * 4 * EXPERTS * HIDDEN, 1 << 20])
def test_errors(chunk_bytes: int) -> None:
    """Those of the combined answers, for any gate values, some tokens twice; whatever the chunks."""
    few, wanted = INPUTS[:100], output(rows(1))[:100]
    data = output_products(few, wanted, LAYER, chunk_bytes)
    tokens, gate = torch.tensor([3, 99, 0, 3]), torch.randn(4, EXPERTS, generator=draws(0))
    combined = np.einsum("tn,tnh->th", double(gate), answers64(few[tokens], MODELS))
    direct = ((combined - double(wanted[tokens])) ** 2).sum(1)
    np.testing.assert_allclose(data.errors(gate, tokens).numpy(), direct, rtol=1e-4)
    weight = torch.rand(100, generator=draws(1))
    heavy = data.weighted(weight)
    np.testing.assert_allclose(heavy.errors(gate, tokens).numpy(), double(weight[tokens]) ** 2 * direct, rtol=1e-4)
    np.testing.assert_allclose(heavy.energy.numpy(), double(weight) ** 2 * (double(wanted) ** 2).sum(1), rtol=1e-5)


@pytest.mark.parametrize("renormalises", [False, True])
def test_gradient(renormalises: bool) -> None:
    """That of the rows, through the experts' answers themselves."""
    wanted, everyone = output(rows(1)), torch.arange(TOKENS)
    one, other = rows(2).requires_grad_(), rows(2).double().requires_grad_()
    known(wanted).errors(gate_values(INPUTS, one, Gate(TOP_K, renormalises)), everyone).sum().backward()
    value, index = (INPUTS.double() @ other.T).softmax(-1).topk(TOP_K, dim=-1)
    if renormalises:
        value = value / value.sum(-1, keepdim=True)
    all_of = [expert_at(MODELS, k).map(torch.Tensor.double) for k in range(EXPERTS)]
    heard = torch.stack([expert_output(INPUTS.double(), expert, silu) for expert in all_of], dim=1)
    chosen = heard.gather(1, index[..., None].expand(-1, -1, HIDDEN))
    ((value[..., None] * chosen).sum(1) - wanted).square().sum().backward()
    assert one.grad is not None
    torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-3, atol=1e-2)


# --- the fit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("renormalises", [False, True])
def test_a_planted_router_is_found(renormalises: bool) -> None:
    truth = rows(1)
    data = known(output(truth, renormalises))
    with torch.no_grad():  # as the merge calls it
        found = fit(data, truth + 0.5 * rows(2), 400, renormalises=renormalises)
    assert found.before > 0.05
    assert found.after < 0.01 * found.before
    agree = gates64(route(INPUTS, found.router, Gate(TOP_K, renormalises)), EXPERTS)
    assert ((agree > 0) == (gates64(route(INPUTS, truth, Gate(TOP_K, renormalises)), EXPERTS) > 0)).mean() > 0.99


def test_errors_are_those_of_the_rows_before_and_returned() -> None:
    """On all held-out tokens, more than a batch, when no rows fit exactly."""
    wanted = output(rows(1)) + torch.randn(TOKENS, HIDDEN, generator=draws(5))
    start = rows(2)
    kept = start.clone()
    settings = FitSettings(batch=64)
    found = fit_router(RouterProblem(INPUTS, known(wanted), HELD_OUT, Gate(TOP_K, False), settings), start, 60, 0)
    assert torch.equal(start, kept)
    assert found.after < found.before
    assert found.before == pytest.approx(error(start, wanted), rel=1e-4)
    assert found.after == pytest.approx(error(found.router, wanted), rel=1e-4)
    assert found.steps in (25, 50, 60)


def test_best_of_all_checks() -> None:
    """A long fit to few tokens gets worse on all others: the rows of its best check are kept."""
    wanted = output(rows(1)) + torch.randn(TOKENS, HIDDEN, generator=draws(5))
    most = torch.arange(TOKENS) >= 20
    found = fit_router(RouterProblem(INPUTS, known(wanted), most, Gate(TOP_K, False)), rows(2), 400, 0)
    assert found.steps in range(25, 400, 25)
    assert found.after < found.before
    assert found.after == pytest.approx(error(found.router, wanted, most), rel=1e-4)


def test_rows_that_are_best_stay() -> None:
    """Bit for bit, with no step kept."""
    truth = rows(1)
    found = fit(known(output(truth)), truth, 50)
    assert torch.equal(found.router, truth)
    assert found.steps == 0
    assert found.after == found.before == pytest.approx(0, abs=1e-6)


def test_fewer_steps_than_between_checks() -> None:
    found = fit(known(output(rows(1))), rows(2), 7)
    assert found.steps == 7
    assert found.after < found.before


def test_not_fitted_on_what_is_held_out() -> None:
    """Held-out errors with other weights: the same rows after the same steps."""
    wanted, weight = output(rows(1)), torch.ones(TOKENS)
    one = fit(known(wanted), rows(2), 25)
    weight[HELD_OUT] = 0.5 + torch.rand(int(HELD_OUT.sum()), generator=draws(0))
    other = fit(known(wanted).weighted(weight), rows(2), 25)
    assert one.steps == other.steps == 25
    assert one.after != other.after
    assert torch.equal(one.router, other.router)


def test_repeats() -> None:
    """With the seed, whatever else draws random numbers; another seed draws other batches."""
    data, state = known(output(rows(1))), torch.get_rng_state()
    one, again, other = (fit(data, rows(2), 30, seed) for seed in (0, 0, 1))
    assert torch.equal(one.router, again.router)
    assert not torch.equal(one.router, other.router)
    assert torch.equal(torch.get_rng_state(), state)


def test_start_in_lower_precision() -> None:
    found = fit(known(output(rows(1))), rows(2).bfloat16(), 30)
    assert found.router.dtype == torch.float32
    assert found.before == pytest.approx(error(rows(2).bfloat16().float(), output(rows(1))), rel=1e-4)
