"""Eigenvalues of R against the recursion they describe, and against the figures that the docs quote."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from namex_hf.bargaining.stability import largest_stable_step, propagation_matrix, spectral_radius

QUATERNION = complex(0.8, math.sqrt(3 * 0.3**2))

moduli = st.floats(0, 0.99)
phases = st.floats(-math.pi, math.pi)
gammas = st.floats(0.01, 4)
weights = st.floats(0.2, 3)


def layer(mu: complex, base: float, expert: float, beta: complex, gamma: float, weight: float) -> tuple[complex, float]:
    """Nguyen et al., eq. 11, for one number and one expert."""
    mu = beta * mu + weight * (expert - base)
    return mu, base + (gamma * mu).real


@given(moduli, phases, gammas, weights, st.tuples(*[st.floats(-2, 2)] * 4))
def test_entries_are_those_of_the_recursion(modulus, phase, gamma, weight, numbers) -> None:
    beta, (real, imaginary, base, expert) = cmath.rect(modulus, phase), numbers
    state = torch.tensor([real, imaginary, base], dtype=torch.float64)
    constant = torch.tensor([weight * expert, 0.0, gamma * weight * expert], dtype=torch.float64)  # q of eq. 19
    mu, moved = layer(complex(real, imaginary), base, expert, beta, gamma, weight)
    following = propagation_matrix(beta, gamma, weight) @ state + constant
    torch.testing.assert_close(
        following, torch.tensor([mu.real, mu.imag, moved], dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    ("beta", "stable_below", "at_one"),
    [
        (0.9, 3.80, 0.949),
        (cmath.rect(0.9, math.pi / 12), 3.80, 0.961),
        (cmath.rect(0.9, -math.pi / 12), 3.80, 0.961),
        (cmath.rect(0.9, math.pi / 6), 1.56, 0.992),
        (cmath.rect(0.9, -math.pi / 6), 1.56, 0.992),
        (QUATERNION, 0.254, 1.036),
    ],
)
def test_published_coefficients(beta: complex, stable_below: float, at_one: float) -> None:
    assert spectral_radius(beta, 1.0) == pytest.approx(at_one, abs=5e-4)
    assert largest_stable_step(beta) == pytest.approx(stable_below, abs=5e-3)
    steps = [stable_below * i / 50 for i in range(1, 50)]
    assert max(spectral_radius(beta, step) for step in steps) < 1
    assert spectral_radius(beta, 1.01 * stable_below) > 1


def test_a_phase_of_thirty_degrees_grows_at_twice_the_step() -> None:
    assert spectral_radius(cmath.rect(0.9, math.pi / 6), 2.0) == pytest.approx(1.004, abs=5e-4)


@given(gammas, weights)
def test_without_momentum_a_layer_keeps_one_minus_gamma(gamma: float, weight: float) -> None:
    assert spectral_radius(0, gamma, weight) == pytest.approx(abs(1 - gamma * weight), abs=1e-12)


@given(moduli, phases, gammas, weights)
def test_only_gamma_times_the_weight_counts(modulus: float, phase: float, gamma: float, weight: float) -> None:
    beta = cmath.rect(modulus, phase)
    # Eigenvalues that nearly coincide lose up to two thirds of the digits.
    assert spectral_radius(beta, gamma, weight) == pytest.approx(spectral_radius(beta, gamma * weight), abs=1e-4)


@given(moduli, phases, weights)
def test_the_largest_stable_step_is_where_the_radius_passes_one(modulus: float, phase: float, weight: float) -> None:
    beta = cmath.rect(modulus, phase)
    bound = largest_stable_step(beta, weight)
    assume(1e-3 < bound < 1e3)
    assert all(spectral_radius(beta, bound * share, weight) < 1 + 1e-9 for share in (0.1, 0.5, 0.9, 0.99))
    assert spectral_radius(beta, bound, weight) == pytest.approx(1, abs=1e-4)
    assert spectral_radius(beta, 1.05 * bound, weight) > 1


@settings(deadline=None)
@given(moduli, phases, gammas, weights)
def test_the_distance_to_the_fixed_expert_goes_like_a_power_of_rho(modulus, phase, gamma, weight) -> None:
    beta, layers = cmath.rect(modulus, phase), 3000
    rho = spectral_radius(beta, gamma, weight)
    assume(rho > 0.05)
    mu, distance, log_size = 0j, 1.0, 0.0
    for _ in range(layers):
        mu, distance = layer(mu, distance, 0.0, beta, gamma, weight)  # the expert is at 0, where mu rests, too
        size = math.hypot(mu.real, mu.imag, distance)
        mu, distance, log_size = mu / size, distance / size, log_size + math.log(size)  # the map is linear
    assert math.exp(log_size / layers) == pytest.approx(rho, rel=0.01)


@pytest.mark.parametrize("beta", [1.0, -1.0, 1j, complex(0.8, 0.7)])
def test_no_step_is_stable_for_a_beta_that_forgets_nothing(beta: complex) -> None:
    with pytest.raises(ValueError, match="modulus below 1"):
        largest_stable_step(beta)
    assert spectral_radius(beta, 1e-3) > 0.999


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_refuses_weights_that_sum_to_nothing(weight: float) -> None:
    with pytest.raises(ValueError, match="total_weight"):
        largest_stable_step(0.9, weight)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("beta", (complex(0.1, math.nan), 1.0)), ("gamma", (0.9, math.inf)), ("total_weight", (0.9, 1.0, math.nan))],
)
def test_refuses_what_is_not_finite(name: str, arguments: tuple) -> None:
    with pytest.raises(ValueError, match=name):
        spectral_radius(*arguments)
