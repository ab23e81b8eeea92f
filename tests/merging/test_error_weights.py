"""How much the error of a token counts, against sums token by token."""

import numpy as np
import pytest
import torch

from namex_hf.merging.error_weights import error_weights
from tests.helpers.mixtures import random_tokens

SOURCES, LENGTH = torch.tensor([3, 0, 3, 7]), 5


def target() -> torch.Tensor:
    """Louder from sequence to sequence."""
    loud = torch.tensor([1.0, 2.0, 4.0, 8.0]).repeat_interleave(LENGTH)
    return random_tokens(len(SOURCES) * LENGTH, 0) * loud[:, None]


def test_without_weights_errors_count_as_they_are() -> None:
    assert torch.equal(error_weights("none", target(), SOURCES), torch.ones(len(SOURCES) * LENGTH))


@pytest.mark.parametrize(("kind", "labels"), [("sequence", range(4)), ("source", [3, 0, 3, 7])])
def test_every_sequence_or_source_counts_alike(kind: str, labels: list[int]) -> None:
    weight = error_weights(kind, target(), SOURCES)
    energy = (weight[:, None].double() * target()).square().sum(1).numpy()
    label = np.repeat(np.array(labels), LENGTH)
    means = [energy[label == one].mean() for one in set(labels)]
    np.testing.assert_allclose(means, means[0], rtol=1e-5)
    assert weight.square().mean().item() == pytest.approx(1)
    for one in set(labels):
        assert len(set(weight[torch.from_numpy(label == one)].tolist())) == 1


@pytest.mark.parametrize("kind", ["none", "source", "sequence"])
def test_nothing_and_zeros_have_finite_weights(kind: str) -> None:
    assert len(error_weights(kind, torch.empty(0, 3), torch.empty(0, dtype=torch.int64))) == 0
    assert error_weights(kind, torch.zeros(4 * LENGTH, 3), SOURCES).isfinite().all()
