"""Small random mixtures, and what they answer in numpy's float64: the reference of all tests on calibration text."""

from collections.abc import Mapping

import numpy as np
import torch

from namex_hf.merging.experts import PROJECTIONS, ExpertWeights
from namex_hf.merging.routing import TokenRouting
from tests.helpers.reference import double

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


def neurons64(inputs: torch.Tensor, expert: Mapping[str, torch.Tensor]) -> np.ndarray:
    gate, up = (double(inputs) @ double(expert[name]).T for name in ("gate_proj", "up_proj"))
    return gate / (1 + np.exp(-gate)) * up


def answers64(inputs: torch.Tensor, experts: Mapping[str, torch.Tensor]) -> np.ndarray:
    """Every expert's answer to every token, ``[tokens, N, hidden]``."""
    all_of = [expert_at(experts, number) for number in range(len(experts["gate_proj"]))]
    return np.stack([neurons64(inputs, one) @ double(one["down_proj"]).T for one in all_of], axis=1)


def shared64(inputs: torch.Tensor, shared: Mapping[str, torch.Tensor]) -> np.ndarray:
    """A shared expert's answer to every token, ``[tokens, hidden]``, behind its gate where it has one."""
    given = neurons64(inputs, shared) @ double(shared["down_proj"]).T
    return given / (1 + np.exp(-double(inputs) @ double(shared["gate"]).T)) if "gate" in shared else given


def gates64(routing: TokenRouting, experts: int) -> np.ndarray:
    """Gate values ``[tokens, N]``, 0 beyond the top-k."""
    gates = np.zeros((len(routing.index), experts))
    for token, (numbers, values) in enumerate(zip(routing.index.tolist(), routing.value.tolist(), strict=True)):
        gates[token, numbers] = values
    return gates


def output64(inputs: torch.Tensor, routing: TokenRouting, experts: Mapping[str, torch.Tensor]) -> np.ndarray:
    """The routed output, ``[tokens, hidden]``."""
    return np.einsum("tn,tnh->th", gates64(routing, len(experts["gate_proj"])), answers64(inputs, experts))


def usage64(routing: TokenRouting, experts: int) -> np.ndarray:
    """Tokens that every expert received, ``[N]``."""
    return (gates64(routing, experts) > 0).sum(0).astype(float)


def saliency64(inputs: torch.Tensor, routing: TokenRouting, experts: Mapping[str, torch.Tensor]) -> np.ndarray:
    """Mean over an expert's tokens of gate value times norm of its answer, ``[N]``; 0 of one without tokens."""
    gates = gates64(routing, len(experts["gate_proj"]))
    added = (gates * np.linalg.norm(answers64(inputs, experts), axis=2)).sum(0)
    return added / np.maximum((gates > 0).sum(0), 1)
