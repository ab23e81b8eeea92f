"""Which neurons of an expert stay: those that carry a super expert's largest output before any other."""

import pytest
import torch
from torch import Tensor

from namex_hf.merging.cut import Cut
from namex_hf.merging.experts import Expert
from namex_hf.recipe.choices import Neurons

EXPERTS, WIDTH, HIDDEN, STAY = 2, 5, 4, 2
WEAK = 1  # neuron of expert 1


class Fixed:
    """Moments under which only the peak of expert 1 speaks for its weak neuron."""

    def __init__(self, tokens: int):
        self.count = tokens

    def tokens(self, number: int) -> int:
        return self.count

    def of(self, number: int, expert: Expert) -> tuple[Tensor, Tensor]:
        peak = torch.tensor([WEAK] if number else [], dtype=torch.int64)
        return torch.eye(WIDTH) * (self.count > 0), peak


def experts() -> Expert:
    draw = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(EXPERTS, WIDTH, HIDDEN, generator=draw) for _ in range(2))
    down = torch.randn(EXPERTS, HIDDEN, WIDTH, generator=draw)
    down[:, :, WEAK] *= 1e-3
    return Expert(gate, up, down)


@pytest.mark.parametrize("neurons", ["second_order", "energy", "gradient"])
@pytest.mark.parametrize("tokens", [9, 2, 1, 0])
def test_neurons_that_carry_a_peak_stay(neurons: Neurons, tokens: int):
    """Whether the expert has tokens enough to refit to or not; without a peak the weak neuron goes."""
    scores = torch.tensor([[3.0, 0.0, 2.0, 1.0, 4.0]] * EXPERTS) if neurons == "gradient" else None
    _, stay = Cut(experts(), Fixed(tokens), STAY, neurons, scores=scores).run()
    assert WEAK not in stay[0].tolist()
    assert WEAK in stay[1].tolist()
    assert (stay.diff() > 0).all()
    if scores is not None and tokens >= STAY:
        assert stay.tolist() == [[0, 4], [WEAK, 4]]
        assert scores[1].tolist() == [3, 0, 2, 1, 4]


def test_random_neurons_take_any_seed_of_a_recipe():
    """Up to 2**64 - 1, which times the number of experts is more than a generator takes."""
    first, second = (Cut(experts(), Fixed(9), STAY, "random", seed).run()[1] for seed in (2**64 - 1, 2**62))
    assert first.shape == second.shape == (EXPERTS, STAY)
