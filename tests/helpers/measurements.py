"""Results as a measurement gives them, out of a random generator."""

from typing import Any

import numpy as np

from namex_hf.evaluation.rows import COSTS

WINDOWS = {"code": 40, "prose": 60}
CLOSE = ("acceptance", "divergence")


def result(seed: int, shift: float = 0.0, experts: int = 8, windows: dict[str, int] | None = None) -> dict[str, Any]:
    """Losses of windows around 3 nats, answers, and costs that tell the seed."""
    draw = np.random.default_rng(seed)
    common = np.random.default_rng(1000)
    losses = {
        name: (3 + common.normal(0, 0.5, count) + shift + draw.normal(0, 0.05, count)).tolist()
        for name, count in (windows or WINDOWS).items()
    }
    right = (draw.random(80) < 0.6 - shift).tolist()
    answers = {
        "packaged": {
            "right": right,
            "tokens": draw.integers(10, 110, 80).tolist(),
            "cut": (draw.random(80) < 0.1).tolist(),
            "loops": (draw.random(80) < 0.1).tolist(),
        }
    }
    costs = dict.fromkeys(COSTS, 10.0 + seed)
    closeness = {
        name: {one: draw.random(count).tolist() for one, count in (windows or WINDOWS).items()} for name in CLOSE
    }
    return {
        "losses": losses,
        "right": right,
        "closeness": closeness,
        "answers": answers,
        "experts": experts,
        "threads": 1,
        "at_once": 1,
        **costs,
    }
