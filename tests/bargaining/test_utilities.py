"""What a step is worth to the players, against hand-made values and brute force."""

from itertools import combinations

import pytest
import torch

from namex_hf.bargaining import nash_bargaining
from namex_hf.bargaining.utilities import aligned_utilities, furthest_gains, interaction, three_most_apart

EVEN = torch.tensor([0.5, 0.5], dtype=torch.float64)


def gram_of_two(cosine: float) -> torch.Tensor:
    return torch.tensor([[1.0, cosine], [cosine, 1.0]], dtype=torch.float64)


def random_vectors(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("cosine", "wanted"), [(0.0, 0.0), (0.5, 1 / 3), (-0.5, -1.0)])
def test_interaction_by_hand(cosine: float, wanted: float):
    # u = (1 + c) / 2 each, of which the other brings c / 2; |Delta|^2 = (1 + c) / 2
    assert interaction(gram_of_two(cosine), EVEN).tolist() == pytest.approx([wanted, wanted])


def test_a_step_of_nothing_has_no_interaction():
    assert interaction(gram_of_two(-1.0), EVEN).tolist() == [0.0, 0.0]


def test_under_the_bargain_own_part_and_interaction_are_one():
    tau = random_vectors(6, 40, 1) + 0.4
    gram = tau @ tau.T
    alpha = nash_bargaining(gram).weights
    by_eq_10 = alpha * (gram @ alpha - alpha * gram.diagonal())
    torch.testing.assert_close(interaction(gram, alpha), by_eq_10)
    torch.testing.assert_close(alpha.square() * gram.diagonal() + by_eq_10, torch.ones_like(alpha))
    torch.testing.assert_close(interaction(gram, alpha / alpha.sum()), by_eq_10)
    torch.testing.assert_close(interaction(gram[None].expand(2, 6, 6), alpha.expand(2, 6))[1], by_eq_10)


def test_utilities_are_cosines_to_the_step():
    tau, weights = random_vectors(4, 9, 2), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    step = weights @ tau
    wanted = torch.nn.functional.cosine_similarity(tau, step[None], dim=1)
    torch.testing.assert_close(aligned_utilities(tau @ tau.T, weights), wanted)


def test_no_step_gives_more_than_the_furthest_gains():
    tau = random_vectors(3, 7, 3)
    steps = torch.nn.functional.normalize(random_vectors(50, 3, 4) @ tau, dim=-1)
    gains = steps @ tau.T / tau.norm(dim=1)
    torch.testing.assert_close(furthest_gains(tau @ tau.T, 5.0 * gains), gains)


def test_domain_vectors_in_one_plane_have_finite_gains():
    tau = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    assert furthest_gains(tau @ tau.T, torch.eye(3, dtype=torch.float64)).isfinite().all()


def test_the_three_most_apart_are_those_of_all_threes():
    tau = random_vectors(7, 30, 5) * torch.linspace(0.5, 3.0, 7, dtype=torch.float64)[:, None] + 0.2
    gram = tau @ tau.T
    cosines = {}
    for players in combinations(range(7), 3):
        some = tau[list(players)]
        nash = nash_bargaining(some @ some.T).weights @ some
        cosines[players] = float(torch.nn.functional.cosine_similarity(nash, some.mean(0), dim=0))
    found = three_most_apart(gram)
    assert found is not None
    assert found.players == min(cosines, key=lambda players: cosines[players])
    assert found.cosine == pytest.approx(min(cosines.values()))
    assert float(found.weights.sum()) == pytest.approx(1.0)
    torch.testing.assert_close(found.gram, gram[list(found.players)][:, list(found.players)])


def test_fewer_than_three_with_a_stake_play_no_game():
    gram = torch.diag(torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))
    assert three_most_apart(gram) is None


def test_three_that_cannot_agree_play_no_game():
    tau = torch.tensor([[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8]], dtype=torch.float64)
    assert three_most_apart(tau @ tau.T) is None
