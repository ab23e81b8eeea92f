"""Standard errors of perplexities and of their ratio, against a simulation."""

import math

import pytest
import torch

from namex_hf.evaluation.statistics import perplexity_change


def draws(seed: int, windows: int) -> torch.Tensor:
    return 3 + 0.2 * torch.randn(windows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_standard_errors_are_those_of_many_repetitions():
    """Two texts; after is before and a little more, so the ratio is known far better than either."""
    runs = []
    for seed in range(0, 4000, 4):
        before = [draws(seed, 40), draws(seed + 1, 20)]
        after = [text + 0.1 + 0.01 * (draws(seed + 2 + n, len(text)) - 3) for n, text in enumerate(before)]
        runs.append(perplexity_change([text.tolist() for text in before], [text.tolist() for text in after]))
    for name, value in (("before", "before"), ("after", "after")):
        spread = torch.tensor([run[value] for run in runs]).std()
        assert sum(run[f"{name}_stderr"] for run in runs) / len(runs) == pytest.approx(float(spread), rel=0.1)
    ratios = torch.tensor([run["after"] / run["before"] for run in runs])
    assert sum(run["ratio_stderr"] for run in runs) / len(runs) == pytest.approx(float(ratios.std()), rel=0.1)
    assert float(ratios.mean()) == pytest.approx(math.exp(0.1), rel=1e-3)
    assert runs[0]["ratio_stderr"] < runs[0]["before_stderr"] / 100


def test_one_window_tells_no_error():
    found = perplexity_change([[1.0]], [[2.0]])
    assert found == {"before": pytest.approx(math.e), "after": pytest.approx(math.e**2)}
