"""``merge: soft`` with ``routing_span: token``: every token has its own merged expert (NAMEx eq. 9, Algorithm 1).

``E^_t = E_m + eta sum_i s_ti (E_i - E_m)``, where s are the token's own top-k values. The merge is linear in every
matrix, so no merged matrix is formed. With G, U and D the gate, up and down matrices,

    h_t = act(G^_t x_t) * (U^_t x_t),    y_t = D^_t h_t,
    M^_t v = (1 - eta sum_i s_ti) M_m v + eta sum_i s_ti M_i v    for M in G, U, D.

The activation acts once, on the sums; a sparse block sums after its activations. The cost is that of top-k experts and
the base expert.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from .soft_cache import Merged
from .soft_kronecker import Kronecker, bent

GROUPED = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of `torch.nn.functional.grouped_mm`."""
ALIGNED = 16
"""The bytes of a row must be a multiple of this for `grouped_mm`."""


class Pairs(NamedTuple):
    """The (token, expert) pairs of a pass, sorted by expert."""

    token: Tensor
    """``[pairs]``: the token of each pair."""
    place: Tensor
    """``[tokens * top_k]``: the places of each token's pairs."""
    ends: Tensor
    """int32 ``[experts]``: number of pairs up to the last of each expert."""

    @classmethod
    def of(cls, index: Tensor, experts: int) -> "Pairs":
        """Args: index, the experts of every token, ``[tokens, top_k]``."""
        by_expert, order = index.flatten().sort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        ends = torch.searchsorted(by_expert, torch.arange(experts, device=order.device), right=True)
        return cls(order // index.shape[1], place, ends.int())

    def products(self, inputs: Tensor, matrices: Tensor, loop: bool) -> Tensor:
        """Every pair's token times its expert's matrix, ``[tokens, top_k, rows]``.

        Args:
            inputs: ``[tokens, columns]``.
            matrices: ``[experts, rows, columns]``.
            loop: whether to compute the experts one by one.
        """
        rows = inputs.index_select(0, self.token).to(matrices.dtype)  # autocast does not cover the grouped product
        if loop or not groupable(rows, matrices):
            lengths = self.ends.diff(prepend=self.ends.new_zeros(1)).tolist()
            parts = [F.linear(part, matrices[i]) for i, part in enumerate(rows.split(lengths)) if len(part)]
            outputs = torch.cat(parts) if parts else rows.new_empty(0, matrices.shape[1])
        else:
            outputs = F.grouped_mm(rows, matrices.mT, offs=self.ends)
        return outputs.index_select(0, self.place).view(len(inputs), -1, matrices.shape[1])


def groupable(inputs: Tensor, matrices: Tensor) -> bool:
    """Whether `grouped_mm` accepts these: it can be compiled in bfloat16 only, and rows must be aligned."""
    kinds = GROUPED[1:2] if torch.compiler.is_compiling() else GROUPED
    aligned = all(side * matrices.element_size() % ALIGNED == 0 for side in matrices.shape[1:])
    new_enough = not inputs.is_cuda or torch.cuda.get_device_capability(inputs.device) >= (8, 0)
    return matrices.dtype in kinds and aligned and new_enough


class TokenExperts(Qwen2MoeExperts):
    """The routed experts. Both products are in one forward: an adapter on the fused tensors acts only there."""

    config: Any

    def forward(
        self,
        tokens: Tensor,
        shares: Tensor,
        index: Tensor,
        base: Merged | None,
        curvature: Kronecker | None = None,
        experts: Merged | None = None,
    ) -> Tensor:
        """``[tokens, hidden] -> [tokens, hidden]``.

        Args:
            shares: eta s, ``[tokens, top_k]``.
            index: their experts, ``[tokens, top_k]``.
            base: gate and up matrix, fused, and down matrix of the base expert, if there is one.
            curvature: trainable, of gate, up and down; None: the identity.
            experts: gate and up, fused, and down, in place of the module's own.

        Memory: the products of every pair, ``tokens * top_k`` rows of twice the width, then of the hidden size; under
        ``batched_mm`` the matrices of every pair too. If top-k is all experts, they are computed one by one: a sum of
        such rows, recomputed for the gradient in training. A curvature adds a copy of the layer's experts.
        """
        gate_up, down = (self.gate_up_proj, self.down_proj) if experts is None else experts
        if curvature is not None:
            gate_up, down = bent(gate_up, down, base, curvature)
        wide = torch.promote_types(shares.dtype, torch.float32)
        shares = shares.to(wide)
        rest = None if base is None else 1 - shares.sum(-1, keepdim=True)
        every = index.shape[-1] == self.num_experts
        implementation = getattr(self.config, "_experts_implementation", None)
        batched = implementation == "batched_mm"
        pairs = None if every or batched else Pairs.of(index, self.num_experts)
        if every:
            shares = torch.zeros_like(shares).scatter(1, index, shares)

        def merged(inputs: Tensor, matrices: Tensor, of_base: Tensor | None) -> Tensor:
            if every:
                total = every_expert(inputs, matrices, shares)
            elif pairs is None:
                total = weighted_sum((matrices[index] @ inputs[:, None, :, None].to(matrices.dtype))[..., 0], shares)
            else:
                total = weighted_sum(pairs.products(inputs, matrices, implementation == "eager"), shares)
            if rest is not None and of_base is not None:
                total = total + rest * F.linear(inputs, of_base)
            return total.to(inputs.dtype)

        gate, up = merged(tokens, gate_up, None if base is None else base[0]).chunk(2, dim=-1)
        return merged(self.act_fn(gate) * up, down, None if base is None else base[1])


def weighted_sum(products: Tensor, shares: Tensor) -> Tensor:
    """``[tokens, top_k, rows]`` and ``[tokens, top_k]`` to ``[tokens, rows]``, in the dtype of the shares."""
    return sum(shares[:, i, None] * products[:, i] for i in range(shares.shape[1]))  # type: ignore[return-value]


def every_expert(inputs: Tensor, matrices: Tensor, shares: Tensor) -> Tensor:
    """``sum_i shares_i matrices_i inputs``, one expert at a time.

    Args:
        inputs: ``[tokens, columns]``.
        matrices: ``[experts, rows, columns]``.
        shares: ``[tokens, experts]``.
    """

    def term(share: Tensor, matrix: Tensor, tokens: Tensor) -> Tensor:
        return share[:, None] * F.linear(tokens, matrix)

    total = shares.new_zeros(len(inputs), matrices.shape[1])
    for share, matrix in zip(shares.unbind(1), matrices, strict=True):
        if torch.is_grad_enabled():  # without checkpoints the products of all experts stay until the backward pass
            total = total + checkpoint(term, share, matrix, inputs, use_reentrant=False)
        else:
            total += term(share, matrix, inputs)
    return total
