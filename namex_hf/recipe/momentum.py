"""The momentum coefficient as a recipe states it: real, complex or quaternion (Nguyen et al., eq. 11 and section 5).

A quaternion beta = b0 + b1 i + b2 j + b3 k is run as the complex number b0 + i |(b1, b2, b3)|. That is no
approximation: the step is real, so the buffer never leaves the plane spanned by 1 and n = (b1 i + b2 j + b3 k) /
|(b1, b2, b3)|, and n n = -1: a copy of the complex numbers, of which the base expert reads the real part. For the same
reason beta and its conjugate give the same base: phases phi and -phi are one algorithm.
"""

from __future__ import annotations

import cmath
import math
from dataclasses import dataclass

KINDS = ("none", "complex", "quaternion")
Quaternion = tuple[float, float, float, float]

#: Modulus 0.9 and the phase 0 (Nguyen et al., section 4), and the quaternion of their section 5.
DEFAULTS: dict[str, complex | Quaternion] = {"complex": 0.9 + 0j, "quaternion": (0.8, 0.3, 0.3, 0.3)}

FORMS = {
    "complex": "one real number such as 0.9, or modulus and radians such as 0.9,0.2618",
    "quaternion": "four numbers such as 0.8,0.3,0.3,0.3",
}


@dataclass(frozen=True)
class Momentum:
    """Kind and coefficient: `beta` is 0 for 'none', a complex number for 'complex', four numbers for 'quaternion'.

    Raises:
        ValueError: an unknown kind, a beta of another form, or one whose modulus is 1 or more.
    """

    kind: str = "none"
    beta: complex | Quaternion = 0j

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"momentum is {self.kind!r}; accepted are {', '.join(KINDS)}")
        if (self.kind == "quaternion") != isinstance(self.beta, tuple):
            raise ValueError(f"beta is {self.beta!r}; momentum {self.kind} accepts {FORMS.get(self.kind, 'no beta')}")
        if isinstance(self.beta, tuple) and len(self.beta) != 4:
            raise ValueError(f"beta has {len(self.beta)} numbers; momentum quaternion accepts {FORMS['quaternion']}")
        if self.kind == "none" and self.beta != 0:
            raise ValueError(f"beta is {self.beta!r}; momentum none accepts no beta")
        if not self.modulus < 1:  # NaN, too
            raise ValueError(f"beta has the modulus {self.modulus:.6g}; accepted is a modulus below 1")

    @property
    def modulus(self) -> float:
        """|beta|."""
        return math.hypot(*self.beta) if isinstance(self.beta, tuple) else abs(self.beta)

    @property
    def complex_beta(self) -> complex:
        """The complex number with which E_m moves in the same way; for `spectral_radius`, too."""
        if isinstance(self.beta, tuple):
            return complex(self.beta[0], math.hypot(*self.beta[1:]))
        return complex(self.beta)


def parse_momentum(kind: str, beta: str | float | None = None) -> Momentum:
    """The fields `momentum` and `beta` of a recipe.

    Args:
        kind: 'none', 'complex' or 'quaternion'.
        beta: complex: '0.9' (a real number, negative ones too), or '0.9,0.2618' (modulus, radians), by default 0.9.
            quaternion: four numbers, by default 0.8,0.3,0.3,0.3. none: nothing.

    Raises:
        ValueError: naming the value and what is accepted; |beta| >= 1, with which mu forgets nothing, is refused.
    """
    if beta is None or kind not in FORMS:
        if beta is not None and kind in KINDS:
            raise ValueError(f"beta is {str(beta)!r}; momentum {kind} accepts no beta")
        return Momentum(kind, DEFAULTS.get(kind, 0j))
    numbers = _numbers(kind, beta)
    refusal = f"beta is {str(beta)!r}; momentum {kind} accepts {FORMS[kind]}"
    value: complex | Quaternion
    if kind == "quaternion" and len(numbers) == 4:
        value = (numbers[0], numbers[1], numbers[2], numbers[3])
    elif kind == "complex" and len(numbers) == 1:
        value = complex(numbers[0])
    elif kind == "complex" and len(numbers) == 2 and numbers[0] >= 0:
        value = cmath.rect(*numbers)
    else:
        raise ValueError(refusal)
    modulus = math.hypot(*value) if isinstance(value, tuple) else abs(numbers[0])  # not of rect, which rounds
    if not modulus < 1:
        raise ValueError(f"beta is {str(beta)!r}, of modulus {modulus:.6g}; accepted is a modulus below 1")
    return Momentum(kind, value)


def _numbers(kind: str, beta: str | float) -> list[float]:
    try:
        if isinstance(beta, bool) or not isinstance(beta, (str, int, float)):
            raise ValueError
        numbers = [float(part) for part in str(beta).split(",")]
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError
    except ValueError:
        raise ValueError(f"beta is {str(beta)!r}; momentum {kind} accepts {FORMS[kind]}") from None
    return numbers
