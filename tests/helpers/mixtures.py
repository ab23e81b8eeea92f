"""Small random mixtures; what they answer is in `reference`."""

from collections.abc import Mapping

import torch

from namex_hf.merging.experts import PROJECTIONS, ExpertWeights
from namex_hf.merging.routing import TokenRouting

HIDDEN, WIDTH = 6, 5


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights_of(parts: Mapping[str, torch.Tensor]) -> ExpertWeights:
    """Matrices by projection as the package has them: those of an expert, or of a layer's experts."""
    return ExpertWeights.of(parts.__getitem__)


def random_experts(count: int, seed: int, dtype: torch.dtype = torch.float32) -> ExpertWeights:
    """Strong enough to bend the activation function."""
    draw = draws(seed)
    shapes = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
    return weights_of({name: torch.randn(count, *shapes[name], generator=draw).to(dtype) for name in PROJECTIONS})


def random_tokens(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=draws(10_000 + seed))


def random_routing(tokens: int, experts: int, top_k: int, seed: int) -> TokenRouting:
    """Gate values from 0.1 to 1.1, in no order."""
    draw = draws(20_000 + seed)
    index = torch.rand(tokens, experts, generator=draw).argsort(1)[:, :top_k]
    return TokenRouting(index, 0.1 + torch.rand(tokens, top_k, generator=draw))


def expert_at(experts: Mapping[str, torch.Tensor], number: int) -> ExpertWeights:
    return weights_of({name: experts[name][number].float() for name in PROJECTIONS})
