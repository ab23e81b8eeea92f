"""Momentum by projection against the equation taken literally: in complex128, and in quaternions of four buffers."""

from __future__ import annotations

import cmath
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from namex_hf.merging.momentum import buffer_names, momentum_step
from namex_hf.recipe.momentum import complex_beta

SHAPES = {"gate_proj": (3, 4), "up_proj": (3, 4), "down_proj": (4, 3)}
LAYERS = 8

quick = settings(max_examples=40, deadline=None)
moduli = st.floats(0, 0.99)
phases = st.floats(-math.pi, math.pi)
gammas = st.floats(0.01, 1.5)
seeds = st.integers(0, 10**6)


def normal(seed: int, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * seed + list(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator)


def walk(beta: complex, gamma: float, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Bases after each layer. A layer pulls to a target of its own: Delta = target - E_m."""
    base, buffers, passed = {name: normal(seed, name) for name in SHAPES}, {}, []
    for layer in range(LAYERS):
        step = {name: normal(seed + layer + 1, name) - base[name] for name in SHAPES}
        base, buffers = momentum_step(base, step, buffers, gamma, beta)
        passed.append(base)
    return passed


def literal(multiply, beta, gamma: float, seed: int, components: int) -> list[dict[str, np.ndarray]]:
    """The same walk in float64, for any algebra: mu is [components, ...], and E_m reads its first component."""
    passed = []
    base = {name: normal(seed, name).double().numpy() for name in SHAPES}
    mu = {name: np.zeros((components, *SHAPES[name])) for name in SHAPES}
    for layer in range(LAYERS):
        for name in SHAPES:
            delta = np.zeros_like(mu[name])
            delta[0] = normal(seed + layer + 1, name).double().numpy() - base[name]
            mu[name] = multiply(beta, mu[name]) + delta
            base[name] = base[name] + gamma * mu[name][0]
        passed.append(dict(base))
    return passed


def complex_product(beta: complex, mu: np.ndarray) -> np.ndarray:
    product = np.complex128(beta) * (mu[0] + 1j * mu[1])
    return np.stack([product.real, product.imag])


def hamilton_product(p: tuple[float, ...], q: np.ndarray) -> np.ndarray:
    return np.stack(
        [
            p[0] * q[0] - p[1] * q[1] - p[2] * q[2] - p[3] * q[3],
            p[0] * q[1] + p[1] * q[0] + p[2] * q[3] - p[3] * q[2],
            p[0] * q[2] - p[1] * q[3] + p[2] * q[0] + p[3] * q[1],
            p[0] * q[3] + p[1] * q[2] - p[2] * q[1] + p[3] * q[0],
        ]
    )


def assert_equal_walks(found: list[dict[str, torch.Tensor]], wanted: list[dict[str, np.ndarray]]) -> None:
    largest = max(np.abs(base[name]).max() for base in wanted for name in SHAPES)
    for ours, theirs in zip(found, wanted, strict=True):
        for name in SHAPES:
            assert ours[name].dtype == torch.float32
            np.testing.assert_allclose(ours[name].numpy(), theirs[name], rtol=0, atol=1e-5 * max(1.0, largest))


# --- the equation ----------------------------------------------------------------------------------------------------


@quick
@given(moduli, phases, gammas, seeds)
def test_complex_equals_complex128(modulus: float, phase: float, gamma: float, seed: int) -> None:
    found = walk(complex_beta("complex", f"{modulus},{phase}"), gamma, seed)
    assert_equal_walks(found, literal(complex_product, cmath.rect(modulus, phase), gamma, seed, components=2))


@quick
@given(st.floats(-0.99, 0.99), gammas, seeds)
def test_real_equals_complex128(beta: float, gamma: float, seed: int) -> None:
    found = walk(complex_beta("complex", repr(beta)), gamma, seed)
    assert_equal_walks(found, literal(complex_product, complex(beta), gamma, seed, components=2))


@quick
@given(st.tuples(*[st.floats(-1, 1)] * 4), moduli, gammas, seeds)
def test_quaternion_equals_four_buffers(direction, modulus: float, gamma: float, seed: int) -> None:
    length = math.hypot(*direction) or 1.0
    beta = tuple(modulus * part / length for part in direction)
    found = walk(complex_beta("quaternion", ",".join(map(repr, beta))), gamma, seed)
    assert_equal_walks(found, literal(hamilton_product, beta, gamma, seed, components=4))


def test_quaternion_of_the_paper() -> None:
    found = walk(complex_beta("quaternion"), 0.5)
    assert_equal_walks(found, literal(hamilton_product, (0.8, 0.3, 0.3, 0.3), 0.5, 0, components=4))
    real = literal(hamilton_product, (0.8, 0.0, 0.0, 0.0), 0.5, 0, components=4)
    assert np.abs(found[-1]["up_proj"].numpy() - real[-1]["up_proj"]).max() > 0.01  # the other parts do count


@quick
@given(moduli, phases, gammas, seeds)
def test_a_phase_and_its_negative_are_one_algorithm(modulus: float, phase: float, gamma: float, seed: int) -> None:
    there = walk(complex_beta("complex", f"{modulus},{phase}"), gamma, seed)
    back = walk(complex_beta("complex", f"{modulus},{-phase}"), gamma, seed)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(there, back, strict=True) for name in SHAPES)


@quick
@given(gammas, seeds)
def test_none_is_a_beta_of_zero_and_the_plain_step(gamma: float, seed: int) -> None:
    none = walk(complex_beta("none"), gamma, seed)
    for zero in (complex_beta("complex", "0"), complex_beta("quaternion", "0,0,0,0")):
        assert all(torch.equal(a[n], b[n]) for a, b in zip(none, walk(zero, gamma, seed), strict=True) for n in SHAPES)
    assert_equal_walks(none, literal(lambda beta, mu: 0 * mu, 0.0, gamma, seed, components=1))


# --- buffers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "beta", "parts"),
    [
        ("none", None, []),
        ("complex", "0.9", ["real"]),
        ("complex", "0.9,0", ["real"]),
        ("complex", "0.9,0.2618", ["real", "imag"]),
        ("quaternion", None, ["real", "imag"]),
        ("quaternion", "0.9,0,0,0", ["real"]),
    ],
)
def test_buffers_survive_a_file(kind: str, beta: str | None, parts: list[str], tmp_path: Path) -> None:
    momentum = complex_beta(kind, beta)
    base = {name: normal(0, name) for name in SHAPES}
    kept, reread = {}, {}
    names = {f"momentum.{part}.{name}" for part in parts for name in SHAPES}
    straight = resumed = base
    for layer in range(3):
        step = {name: normal(layer + 1, name) for name in SHAPES}
        straight, kept = momentum_step(straight, step, kept, 0.7, momentum)
        resumed, reread = momentum_step(resumed, step, reread, 0.7, momentum)
        assert set(kept) == set(buffer_names(SHAPES, momentum)) == names
        assert all(buffer.dtype == torch.float32 for buffer in kept.values())
        save_file(reread, tmp_path / "buffers.safetensors")
        reread = load_file(tmp_path / "buffers.safetensors")
    assert list(straight) == list(SHAPES)
    assert all(torch.equal(straight[name], resumed[name]) for name in SHAPES)


@pytest.mark.parametrize("kind", ["none", "complex", "quaternion"])
def test_arguments_are_left_alone_and_shared_with_nothing(kind: str) -> None:
    momentum = complex_beta(kind)
    base, step = ({name: normal(seed, name) for name in SHAPES} for seed in (0, 1))
    buffers: dict[str, torch.Tensor] = {}
    for _ in range(2):
        before = [{name: tensor.clone() for name, tensor in some.items()} for some in (base, step, buffers)]
        next_base, next_buffers = momentum_step(base, step, buffers, 1.0, momentum)
        for some, copy in zip((base, step, buffers), before, strict=True):
            assert set(some) == set(copy)
            assert all(torch.equal(some[name], copy[name]) for name in copy)
        given = {tensor.data_ptr() for some in (base, step, buffers) for tensor in some.values()}
        assert not given & {tensor.data_ptr() for some in (next_base, next_buffers) for tensor in some.values()}
        base, buffers = next_base, next_buffers


def test_refuses_buffers_of_another_momentum() -> None:
    base = {name: normal(0, name) for name in SHAPES}
    _, buffers = momentum_step(base, base, {}, 1.0, 0.9 + 0j)
    for other in (complex_beta("quaternion"), complex_beta("none")):
        with pytest.raises(ValueError, match=r"momentum\.real\.gate_proj"):
            momentum_step(base, base, buffers, 1.0, other)
    del buffers["momentum.real.up_proj"]
    with pytest.raises(ValueError, match=r"buffers are .* accepted are .*up_proj"):
        momentum_step(base, base, buffers, 1.0, 0.9 + 0j)


def test_refuses_steps_of_other_matrices() -> None:
    base = {name: normal(0, name) for name in SHAPES}
    with pytest.raises(ValueError, match="steps are for"):
        momentum_step(base, {"gate_proj": base["gate_proj"]}, {}, 1.0, 0j)


# --- the fields of a recipe ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "beta", "expected"),
    [
        ("none", None, 0),
        ("complex", None, 0.9),
        ("complex", "0.9", 0.9),
        ("complex", "0", 0),
        ("complex", "-0.5", -0.5),
        ("complex", " 0.9 , 0.2618 ", cmath.rect(0.9, 0.2618)),
        ("complex", "0.9,-0.5236", cmath.rect(0.9, -0.5236)),
        ("quaternion", None, complex(0.8, 0.27**0.5)),
        ("quaternion", "0.1,-0.2,0.3,0.4", complex(0.1, 0.29**0.5)),
    ],
)
def test_parses(kind: str, beta: str | None, expected: complex) -> None:
    assert complex_beta(kind, beta) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("kind", "beta", "message"),
    [
        ("complex", "1", r"'1', of modulus 1; .*below 1"),
        ("complex", "-1.5", r"'-1.5', of modulus 1.5"),
        ("complex", "1,0.3", r"'1,0.3', of modulus 1;"),
        ("complex", "1.25", r"'1.25', of modulus 1.25"),
        ("quaternion", "0.8,0.4,0.4,0.4", r"of modulus 1.05"),
        ("quaternion", "1,0,0,0", r"of modulus 1;"),
        ("complex", "", r"'';.*one real number"),
        ("complex", "fast", r"'fast';.*one real number"),
        ("complex", "0.9,", r"'0.9,'"),
        ("complex", "nan", r"'nan'"),
        ("complex", "0.5,inf", r"'0.5,inf'"),
        ("complex", "-0.9,0.3", r"'-0.9,0.3'.*modulus and radians"),
        ("complex", "0.9,0.2,0.1", r"'0.9,0.2,0.1'"),
        ("complex", "0.8,0.3,0.3,0.3", r"momentum complex accepts"),
        ("quaternion", "0.9", r"'0.9';.*four numbers"),
        ("quaternion", "0.9,0.2618", r"four numbers"),
    ],
)
def test_refuses(kind: str, beta: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        complex_beta(kind, beta)
