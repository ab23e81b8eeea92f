"""The parameters of a decoder layer in the form that its forward uses: unsharded, and with adapters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ..merging.base import own_base
from ..merging.experts import PROJECTIONS, Expert, ExpertWeights
from ..models.soft import dense_weight
from ..models.soft_kronecker import Factors
from ..recipe import BaseExpert


@contextmanager
def gathered(layer: nn.Module) -> Iterator[None]:
    """Inside this context every process has the whole parameters of this layer.

    Memory: a decoder layer if it is sharded (FSDP2, DeepSpeed ZeRO-3).
    """
    if isinstance(layer, FSDPModule):
        layer.unshard()
        try:
            yield
        finally:
            layer.reshard()
    elif any(hasattr(parameter, "ds_id") for parameter in layer.parameters()):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(layer.parameters())):
            yield
    else:
        yield


def applied(module: Any, name: str) -> torch.Tensor:
    """A fused tensor of experts as the forward uses it, LoRA included. Gradients reach both.

    Args:
        module: the experts, or PEFT's wrappers around them, one for each tensor.

    Memory: a copy of the tensor if an adapter acts on it.
    """
    wrapper, delta = module, None
    while hasattr(wrapper, "base_layer"):
        if wrapper.parameter_name == name and not wrapper.merged and not wrapper.disable_adapters:
            for adapter in wrapper.active_adapters:
                more = wrapper.get_delta_weight(adapter)
                delta = more if delta is None else delta + more
        wrapper = wrapper.base_layer
    value = getattr(wrapper, name)
    return value if delta is None else value + delta


def attached_experts_of(block: Any) -> Expert:
    """Routed experts of a block, stacked; views unless an adapter acts on them. Gradients reach them."""
    gate, up = applied(block.experts, "gate_up_proj").chunk(2, dim=1)
    return ExpertWeights(gate, up, applied(block.experts, "down_proj"))


def experts_of(block: Any) -> Expert:
    """`attached_experts_of`, without gradients."""
    with torch.no_grad():
        return attached_experts_of(block).map(torch.Tensor.detach)


def base_of(block: Any) -> Expert:
    """A copy of the base expert of a block, in float32."""
    return matrices_of(block.base_expert)


def own_base_of(block: Any, choice: BaseExpert, shared_name: str, width: int) -> Expert:
    """The base expert from a block's own parameters (`merging.base.own_base`), for a block that stores none."""
    experts = experts_of(block)
    base = own_base(choice, experts, lambda: matrices_of(getattr(block, shared_name)), width)
    return base.map(lambda matrix: matrix.to(experts.down.device))


def matrices_of(mlp: Any) -> Expert:
    """A copy of the matrices of a SwiGLU MLP, in float32."""
    like = next(mlp.parameters())
    return ExpertWeights.of(lambda name: dense_weight(getattr(mlp, name), like).detach().float().clone())


def curvature_of(block: Any) -> dict[str, Factors] | None:
    """The trainable M_i of a block's experts by projection, with gradients. None if they are folded into the experts,
    or the block stays sparse."""
    if getattr(block, "curvature", None) is None:
        return None
    like = next(block.base_expert.parameters())
    return dict(zip(PROJECTIONS, block.curvature(like), strict=True))


@torch.no_grad()
def write_base(block: Any, base: Mapping[str, torch.Tensor]) -> None:
    """Overwrite the base expert of a block, on every process with its shard of the first process's `base`.

    Args:
        base: whole matrices by projection.
    """
    for name, matrix in base.items():
        parameter = getattr(block.base_expert, name).weight
        value = matrix.to(parameter.dtype).contiguous()
        if isinstance(parameter, DTensor):
            sharded = distribute_tensor(value, parameter.device_mesh, parameter.placements)  # from the first process
            parameter.to_local().copy_(sharded.to_local())
        elif hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(value)
            if parameter.requires_grad:  # the optimiser's next step would restore the old base from its own copy
                deepspeed.utils.safe_set_full_fp32_param(parameter, matrix.to(parameter.device))
        else:
            parameter.copy_(of_first_process(value, parameter.device))


def of_first_process(value: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The first process's `value`, on `device`, so that all processes are equal bit for bit."""
    if distributed.is_available() and distributed.is_initialized():
        value = value.to(device)
        distributed.broadcast(value, 0)
    return value
