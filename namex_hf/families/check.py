"""What a family says of its routers and experts, against the class of transformers, on random numbers."""

import copy
from typing import Any

import torch
import transformers
from torch import nn

from ..errors import FamilyError
from ..merging.experts import ExpertWeights
from ..merging.routing import expert_output, route
from .family import Config
from .outline import Outline, build

VECTORS, ROUNDED = 64, 2
"""How many random vectors, and for how many of them two experts may be so close that rounding chooses between them."""
TOLERANCE = 1e-4


@torch.no_grad()
def check_block(config: Config, outline: Outline) -> None:
    """Let a MoE block route random vectors, and two of its experts answer them.

    A description that another release of transformers contradicts is found here, before anything is written.

    Memory: a MoE block with two routed experts, in float32.

    Raises:
        FamilyError: the class chooses other experts, weighs them otherwise, or computes something else.
    """
    block: Any = copy.deepcopy(build(config).get_submodule(outline.blocks[outline.shape.layers[0]])).float()
    draw = torch.Generator().manual_seed(0)
    experts = _two_experts(block.experts, draw)
    block.experts = recorder = _Recorder()
    for name, tensor in block.state_dict().items():
        size = 1.0 if name == outline.family.router else 0.05
        _set(block, name, size * torch.randn(tensor.shape, generator=draw))
    inputs = torch.randn(1, VECTORS, outline.shape.hidden, generator=draw) / outline.shape.hidden**0.5
    block(inputs)
    _check_gate(outline, block, recorder, inputs[0])
    _check_experts(outline, experts, inputs[0], draw)


def _check_gate(outline: Outline, block: nn.Module, recorder: "_Recorder", inputs: torch.Tensor) -> None:
    family, tensors = outline.family, block.state_dict()
    ours = route(inputs, tensors[family.router], outline.shape.gate, tensors.get(family.bias or ""))
    dense, expected = (
        torch.zeros(VECTORS, len(tensors[family.router])).scatter_(1, index, value.float())
        for index, value in ((ours.index, ours.value), (recorder.index, recorder.value))
    )
    _expect_equal(outline, "gate values", dense, expected)


def _check_experts(outline: Outline, experts: Any, inputs: torch.Tensor, draw: torch.Generator) -> None:
    index, value = torch.tensor([[0, 1]]).repeat(VECTORS, 1), torch.rand(VECTORS, 2, generator=draw)
    width = outline.shape.width
    gate_up, down = experts.gate_up_proj, experts.down_proj
    both = [
        expert_output(inputs, ExpertWeights(gate_up[e, :width], gate_up[e, width:], down[e]), outline.activation)
        for e in range(2)
    ]
    _expect_equal(
        outline, "outputs of experts", value[:, :1] * both[0] + value[:, 1:] * both[1], experts(inputs, index, value)
    )


def _expect_equal(outline: Outline, what: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    errors = (ours - theirs).abs().amax(1) / theirs.abs().max()
    apart = float(errors.sort().values[-1 - ROUNDED])
    if not apart <= TOLERANCE:
        raise FamilyError(
            f"model_type {outline.family.model_type!r}: {what} of the class in transformers "
            f"{transformers.__version__} are others than its family says (by {apart:.1e}, accepted {TOLERANCE:.0e})"
        )


class _Recorder(nn.Module):
    """In the place of the experts: keeps what it is given."""

    def forward(self, inputs: torch.Tensor, index: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        self.index, self.value = index, value
        return torch.zeros_like(inputs)


def _two_experts(experts: Any, draw: torch.Generator) -> Any:
    """A module of the same class with two experts, with random matrices."""
    two = copy.copy(experts)
    two._parameters = {
        name: nn.Parameter(torch.randn(2, *matrix.shape[1:], generator=draw) / matrix.shape[-1] ** 0.5)
        for name, matrix in experts.named_parameters()
    }
    two.num_experts = 2
    return two


def _set(module: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    setattr(owner, leaf, nn.Parameter(value) if leaf in owner._parameters else value)
