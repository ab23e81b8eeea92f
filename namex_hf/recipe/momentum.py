"""The momentum coefficient as a recipe states it: real, complex or quaternion (Nguyen et al., eq. 11 and section 5).

A quaternion beta = b0 + b1 i + b2 j + b3 k is run as the complex number b0 + i |(b1, b2, b3)|. That is no
approximation: the step is real, so the buffer never leaves the plane spanned by 1 and n = (b1 i + b2 j + b3 k) /
|(b1, b2, b3)|, and n n = -1: a copy of the complex numbers, of which the base expert reads the real part. For the same
reason beta and its conjugate give the same base: phases phi and -phi are one algorithm.
"""

import cmath
import math

DEFAULTS = {"complex": "0.9", "quaternion": "0.8,0.3,0.3,0.3"}
"""Modulus 0.9 and the phase 0 (Nguyen et al., section 4), and the quaternion of their section 5."""
FORMS = {
    "complex": "one real number such as 0.9, or modulus and radians such as 0.9,0.2618",
    "quaternion": "four numbers such as 0.8,0.3,0.3,0.3",
}


def complex_beta(kind: str, beta: str | None = None) -> complex:
    """The complex number with which E_m moves as under the fields `momentum` and `beta`; for `spectral_radius`, too.

    Args:
        kind: 'none', 'complex' or 'quaternion'.
        beta: complex: '0.9' (a real number, negative ones too), or '0.9,0.2618' (modulus, radians), by default 0.9.
            quaternion: four numbers, by default 0.8,0.3,0.3,0.3.

    Raises:
        ValueError: naming the value and what is accepted; |beta| >= 1, with which mu forgets nothing, is refused.
    """
    if kind == "none":
        return 0j
    try:
        numbers = [float(part) for part in (DEFAULTS[kind] if beta is None else beta).split(",")]
    except ValueError:
        numbers = []
    four = kind == "quaternion"
    fits = len(numbers) == 4 if four else len(numbers) == 1 or (len(numbers) == 2 and numbers[0] >= 0)
    if not fits or not all(map(math.isfinite, numbers)):
        raise ValueError(f"beta is {beta!r}; momentum {kind} accepts {FORMS[kind]}")
    modulus = math.hypot(*numbers) if four else abs(numbers[0])  # not of rect, which rounds
    if not modulus < 1:
        raise ValueError(f"beta is {beta!r}, of modulus {modulus:.6g}; accepted is a modulus below 1")
    if four:
        return complex(numbers[0], math.hypot(*numbers[1:]))
    return cmath.rect(*numbers) if len(numbers) == 2 else complex(numbers[0])
