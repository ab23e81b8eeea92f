"""Weights of a game's players, one file a weighting: by name, by what text shows of them, and by nothing else."""

import numpy as np
import pytest
import torch

from namex_hf.merging.combine import shares
from namex_hf.merging.weightings import WEIGHTINGS, ExpertStatistics, Weights
from namex_hf.recipe import FIELDS, Grouped, GroupGame
from tests.helpers.mixtures import draws

PLAYERS = 5
TAU = torch.randn(3, PLAYERS, 12, generator=draws(0), dtype=torch.float64)
GRAM = TAU @ TAU.mT
USAGE = torch.tensor([4.0, 0.0, 1.0, 2.0, 9.0], dtype=torch.float64)
SALIENCY = torch.tensor([0.3, 0.0, 2.5, 0.1, 0.6], dtype=torch.float64)


def weigh(weighting: str, seen: ExpertStatistics | None, **rules) -> Weights:
    return WEIGHTINGS[weighting](GRAM, GroupGame(**rules), torch.float32, seen)


def test_every_weighting_of_the_recipe_is_here() -> None:
    assert set(WEIGHTINGS) == set(FIELDS["weighting"].choices)


@pytest.mark.parametrize(("weighting", "amount"), [("usage", USAGE), ("saliency", SALIENCY)])
def test_shares_of_what_is_seen(weighting: str, amount: torch.Tensor) -> None:
    """Alike in every game, whatever the Gram matrices and the other amount say."""
    found = weigh(weighting, ExpertStatistics(USAGE, SALIENCY))
    wanted = np.tile(amount.numpy() / amount.numpy().sum(), (3, 1))
    np.testing.assert_allclose(found.values.numpy(), wanted, rtol=1e-12)
    assert found.values.dtype == torch.float64
    assert (found.status, found.residual, found.iterations) == ((weighting,) * 3, (None,) * 3, (None,) * 3)
    other = (
        ExpertStatistics(USAGE, SALIENCY.flip(0)) if weighting == "usage" else ExpertStatistics(USAGE.flip(0), SALIENCY)
    )
    assert torch.equal(weigh(weighting, other).values, found.values)


@pytest.mark.parametrize("weighting", ["usage", "saliency"])
def test_nobody_seen_is_everybody_alike(weighting: str) -> None:
    found = weigh(weighting, ExpertStatistics(torch.zeros(PLAYERS), torch.zeros(PLAYERS)))
    np.testing.assert_allclose(found.values.numpy(), np.full((3, PLAYERS), 1 / PLAYERS))


def test_without_text() -> None:
    with pytest.raises(ValueError, match="weights by usage need calibration text"):
        weigh("usage", None)
    for seen in (None, ExpertStatistics(USAGE)):
        with pytest.raises(ValueError, match="weights by saliency need calibration text"):
            weigh("saliency", seen)


@pytest.mark.parametrize("weighting", ["uniform", "nash"])
def test_others_do_not_look(weighting: str) -> None:
    """But for a bargain whose power is usage, and that not at saliency."""
    without, plain = weigh(weighting, None), weigh(weighting, ExpertStatistics(USAGE.clamp(min=1), SALIENCY))
    assert torch.equal(without.values, plain.values)
    powers = [
        weigh(weighting, ExpertStatistics(USAGE.clamp(min=1), amount), power="usage").values
        for amount in (SALIENCY, None)
    ]
    assert torch.equal(*powers)
    assert torch.equal(powers[0], plain.values) == (weighting == "uniform")


def test_in_a_group_the_first_has_its_share_too() -> None:
    """Only a bargain, in which the first is the base and has no stake, gives it 1/n."""
    seen = ExpertStatistics(USAGE, SALIENCY)
    for weighting, wanted in (("usage", 4 / 16), ("saliency", 0.3 / 3.5), ("uniform", 1 / PLAYERS)):
        found = shares(GRAM, Grouped(experts=1, weighting=weighting), torch.float32, seen)
        np.testing.assert_allclose(found.values[:, 0].numpy(), wanted)
