"""What a router does with a layer's tokens, and the outputs of the experts that it chooses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch.nn.functional import pad

from .experts import Expert, Experts, ExpertWeights
from .gate import Gate

ROWS, FILLED = 1024, 128
"""Tokens of a product in bfloat16, and what their number is a multiple of: the last ones are filled up with zeros."""
Activation = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class TokenRouting:
    """Where a layer's tokens went."""

    index: torch.Tensor  # int64 [tokens, top_k]
    value: torch.Tensor  # float32 [tokens, top_k], the gate values as the experts receive them

    def of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens ``[n]`` that an expert receives, and their gate values ``[n]``."""
        token, place = (self.index == expert).nonzero(as_tuple=True)
        return token, self.value[token, place]

    def count(self, experts: int) -> torch.Tensor:
        """How many tokens every expert received, int64 ``[experts]``."""
        return self.index.flatten().bincount(minlength=experts)

    def mass(self, experts: int) -> torch.Tensor:
        """The sum of every expert's gate values, float64 ``[experts]``."""
        sums = torch.zeros(experts, dtype=torch.float64, device=self.value.device)
        return sums.index_add_(0, self.index.flatten(), self.value.flatten().double())


def route(inputs: torch.Tensor, router: torch.Tensor, gate: Gate, bias: torch.Tensor | None = None) -> TokenRouting:
    """What a router does with its inputs.

    Args:
        inputs: float32 ``[tokens, hidden]``.
        router: ``[experts, hidden]``.
        bias: as `Gate` takes it.
    """
    value, index = gate(inputs @ router.float().T, bias)
    return TokenRouting(index, value)


def gate_values(
    inputs: torch.Tensor, router: torch.Tensor, gate: Gate, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Dense gate values ``[tokens, K]``, zero beyond the top-k; differentiable in the router. Args: as `route`."""
    value, index = gate(inputs @ router.T, bias)
    return torch.zeros(len(inputs), len(router), dtype=value.dtype, device=value.device).scatter(1, index, value)


def neurons(inputs: torch.Tensor, expert: Expert, activation: Activation) -> torch.Tensor:
    """What an expert's down matrix receives, ``act(x gate^T) * (x up^T)``, or ``act(x up^T)``: ``[tokens, width]``."""
    up = _linear(inputs, expert.up, expert.up_bias)
    return activation(up) if expert.gate is None else activation(_linear(inputs, expert.gate, expert.gate_bias)) * up


def _linear(inputs: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return inputs @ matrix.T if bias is None else inputs @ matrix.T + bias


def expert_output(inputs: torch.Tensor, expert: Expert, activation: Activation) -> torch.Tensor:
    """An expert's output, ``[tokens, hidden]``, before its gate value."""
    return _linear(neurons(inputs, expert, activation), expert.down, expert.down_bias)


@cache
def multiplies_bfloat16(kind: str) -> bool:
    """Whether a kind of device has products of bfloat16 in its hardware. Args: kind, such as ``cpu``."""
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    asks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return kind == "cpu" and any(getattr(torch.cpu, name, bool)() for name in asks)


def on_tokens(
    function: Callable[[torch.Tensor, Expert, Activation], torch.Tensor],
    inputs: torch.Tensor,
    expert: Expert,
    activation: Activation,
) -> torch.Tensor:
    """What `neurons` or `expert_output` gives, in float32.

    An expert in bfloat16 is multiplied in bfloat16, as the model itself does, where the device is made for that: five
    times as fast on a CPU with AMX. Others are multiplied in float32.

    Args:
        inputs: float32 ``[tokens, hidden]``.
        expert: in its own dtype.
    """
    if expert.dtype != torch.bfloat16 or not multiplies_bfloat16(inputs.device.type):
        return function(inputs, expert.to(inputs), activation)
    expert, parts = expert.to(inputs.new_empty(0, dtype=torch.bfloat16)), []
    for rows in inputs.split(ROWS):  # few numbers of rows: the library holds code and memory for each
        filled = pad(rows.bfloat16(), (0, 0, 0, -len(rows) % FILLED))
        parts.append(function(filled, expert, activation)[: len(rows)].float())
    return torch.cat(parts)


def shared_expert_output(
    inputs: torch.Tensor, shared: Mapping[str, torch.Tensor], activation: Activation
) -> torch.Tensor:
    """The output of the shared expert, which every token receives, ``[tokens, hidden]``.

    Args:
        shared: by projection, and where the family has one ``gate`` ``[1, hidden]``, whose sigmoid scales the output.
    """
    output = expert_output(inputs, ExpertWeights.of(shared.__getitem__), activation)
    return (inputs @ shared["gate"].T).sigmoid() * output if "gate" in shared else output


Visit = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Called with an expert's number, the gate values ``[n]`` of its tokens and its outputs to them ``[n, hidden]``."""


def routed_output(
    inputs: torch.Tensor,
    routing: TokenRouting,
    experts: Experts,
    activation: Activation,
    visit: Visit | None = None,
) -> torch.Tensor:
    """``sum_topk s_i f_i(x)``, float32 ``[tokens, hidden]``.

    Args:
        visit: reads each expert's outputs on the way, so that they are computed once.

    Memory: beyond the result one expert in float32, and its tokens three times. Experts without tokens are not read.
    """
    output = torch.zeros_like(inputs)
    for number in range(experts.count):
        token, gate = routing.of(number)
        if len(token):
            answers = on_tokens(expert_output, inputs[token], experts.expert(number), activation)
            output.index_add_(0, token, gate[:, None] * answers)
            if visit is not None:
                visit(number, gate, answers)
    return output
