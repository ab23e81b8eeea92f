"""``merge: soft``, shared by the families: tokens go through a merged expert, here the expert of a causal segment.

Where every token has its own merged expert, `soft_token` has the experts.

NAMEx eq. 9 for a segment (the paper has no segments): ``E^ = E_m + eta sum_i s_i M_i (E_i - E_m)``. With M_i = I it is
``(1 - eta sum_i s_i) E_m + eta sum_i s_i E_i`` (for other M_i see `soft_curvature`). s is the mean of the router's
top-k softmax values (zero for all other experts, not renormalised) over the unpadded tokens of the same document

* before the segment (``routing_span: all``), or only in the segment before it (``previous``); or
* ``prompt``, Lory's rule for inference: the tokens of the first pass with a cache are processed as under ``all``. (In
  `generate` these are all passes up to the first new token; ``prefill_chunk_size`` makes several.) Later tokens all go
  through one expert, whose s is the mean over the whole prompt. **Cached and uncached generation then differ**, because
  without a cache every pass is a first pass.

The first segment of a document has no tokens before it: s = 0, the base expert. No token's expert depends on the token
itself or on a later token.

``method: smear`` (SMEAR, Muqeeth et al. 2023) has no base expert: ``E^ = sum_i s_i E_i`` with s the mean over the same
tokens of values that sum to 1: by default those of all experts, else of top-k, renormalised. The first segment uses
s = 1/N, the plain mean of the experts, because there is no base expert and its own tokens must not route it.

Another `routing` replaces the values in the mean: ``cosine`` by its own top-k softmax values, ``stable`` by the
router's softmax values at the experts assigned to the tokens' ids. An assignment of all experts would choose nothing,
so by default ``smear`` then uses the model's own number of experts.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts, Qwen2MoeMLP

from .configuration_namex import routing_of, soft_choice
from .routers import ChosenRouting
from .soft_cache import LayerMemory, Merged
from .soft_curvature import CalibratedCurvature, Directions, correction, reweighted
from .soft_kronecker import Kronecker, KroneckerCurvature, KroneckerProducts, bent
from .soft_segments import Segments
from .soft_token import TokenExperts

LARGEST = 1 << 30
"""Bytes of merged experts that may exist at once; more groups are processed in turn."""
FEW = 3
"""The experts in use are copied first if they are at most 1 in `FEW` of all: the measured break-even is 2 to 3."""
PLAIN = (TokenExperts, KroneckerProducts, nn.Linear)
"""Modules whose forward uses their parameters unchanged; a wrapper has another class."""


def dense_weight(linear: Any, like: Tensor) -> Tensor:
    """The matrix that `linear` applies, also with an adapter, and also if its weight is offloaded."""
    if type(linear) is nn.Linear and not linear.weight.is_meta:
        return linear.weight
    return linear(torch.eye(linear.in_features, dtype=like.dtype, device=like.device)).T


def base_matrices(expert: Any, like: Tensor) -> dict[str, Tensor]:
    """`dense_weight` of the three matrices of a base expert, by projection."""
    return {name: dense_weight(getattr(expert, name), like) for name in ("gate_proj", "up_proj", "down_proj")}


def swiglu(tokens: Tensor, merged: Merged, activation) -> Tensor:
    """Output of every group's own expert, ``[groups, tokens, hidden] -> [groups, tokens, hidden]``."""
    gate_up, down = merged
    gate, up = tokens.bmm(gate_up.mT).chunk(2, dim=-1)
    return (activation(gate) * up).bmm(down.mT)


def merge_experts(shares: Tensor, rest: Tensor, experts: Tensor, base: Tensor | None) -> Tensor:
    """``rest base + sum_i shares_i experts_i`` of all groups: one product over the expert axis, one rank-one term.

    Args:
        shares: ``[groups, experts]``.
        rest: ``[groups]``.
        experts: ``[experts, rows, columns]``.
        base: ``[rows, columns]``; None: without the base term.
    """
    shares, rest = shares.to(experts.dtype), rest.to(experts.dtype)
    if base is None:
        return (shares @ experts.flatten(1)).view(-1, *experts.shape[1:])
    return torch.outer(rest, base.flatten()).addmm_(shares, experts.flatten(1)).view(-1, *base.shape)


def merge_curved(
    shares: Tensor,
    rest: Tensor,
    experts: Tensor,
    base: Tensor | None,
    used: Tensor | None,
    directions: Directions | None,
) -> Tensor:
    """`merge_experts` with a calibrated curvature; without `directions` it is `merge_experts` alone.

    Args:
        shares: ``[groups, all experts]``, at least float32.
        experts: ``[used experts, rows, columns]``.
        used: indices of the used experts; None: all.
    """
    weight = None
    if directions is not None:
        shares, rest, weight = reweighted(shares, rest, directions)
    plain = merge_experts(shares if used is None else shares[:, used], rest, experts, base)
    if directions is None or weight is None:
        return plain
    return plain + correction(plain, shares, weight, experts, used, base, directions)


class SoftExperts(Qwen2MoeExperts):
    """The routed experts, merged in their own module, so that adapters on the fused tensors take effect."""

    def forward(
        self,
        tokens: Tensor,
        shares: Tensor,
        base: Merged | None,
        carried: Merged | None = None,
        keep: Tensor | None = None,
        curvature: tuple[Directions, Directions] | Kronecker | None = None,
    ) -> tuple[Tensor, Merged]:
        """Merge the experts of the fresh groups, and apply every group's own expert.

        Args:
            tokens: ``[groups, tokens, hidden]``, the carried groups first.
            shares: ``[fresh groups, experts]``, eta s, at least float32.
            base: gate and up matrix, fused, and down matrix of the base expert, if there is one.
            carried: merged experts from earlier passes.
            keep: groups whose expert is returned, in ascending order; None: all.
            curvature: calibrated, of gate and up, and of down; or trainable, of gate, up and down; None: the identity.

        Returns:
            The output, shaped as `tokens`, and the merged experts of `keep`.

        Memory: at a time `LARGEST` bytes of merged experts. A trainable curvature adds a copy of the experts in use,
        and the memory of `curved` for gates, ups and downs in turn.
        """
        gate_up, down, used = self.gate_up_proj, self.down_proj, None
        # Without a base expert the rest is exactly 0, whatever the rounding of the shares.
        rest = torch.zeros_like(shares[:, 0]) if base is None else 1 - shares.sum(-1)
        # A compiled graph cannot branch on data, such as which experts are in use: it uses all of them.
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            in_use = shares.any(0).nonzero()[:, 0]
            if FEW * len(in_use) <= self.num_experts:
                gate_up, down, used = gate_up[in_use], down[in_use], in_use
        directions: tuple[Directions | None, ...] = (None, None)
        if curvature is not None and len(curvature) == 3:
            gate_up, down = bent(gate_up, down, base, curvature, used)
        elif curvature is not None:
            directions = curvature
        parts = list(zip((gate_up, down), base or (None, None), directions, strict=True))
        step = self.groups_at_once(directions[0])
        pieces = list(zip(shares.split(step), rest.split(step), strict=True))
        outputs, kept, start = [], [], 0
        for piece in pieces if carried is None else [None, *pieces]:
            if piece is None:
                merged: Any = carried
            else:
                some, left = piece
                merged = [merge_curved(some, left, experts, of_base, used, along) for experts, of_base, along in parts]
            end = start + len(merged[0])
            outputs.append(swiglu(tokens[start:end], merged, self.act_fn))
            if keep is None or not len(keep):  # in training: the mask below would depend on data
                kept.append(_at(merged, keep))
            else:
                kept.append(_at(merged, keep[(keep >= start) & (keep < end)] - start))
            start = end
        if len(outputs) == 1:
            return outputs[0], kept[0]
        gate_ups, downs = zip(*kept, strict=True)
        return torch.cat(outputs), (torch.cat(gate_ups), torch.cat(downs))

    def groups_at_once(self, directions: Directions | None) -> int:
        """Number of groups whose experts are merged at once, in about `LARGEST` bytes."""
        size = 3 * self.hidden_dim * self.intermediate_dim * self.gate_up_proj.element_size()
        if directions is not None:  # a copy, and the float32 memory of `correction`
            size = 2 * size + 24 * self.intermediate_dim * directions.leading[..., 0, :].numel()
        return max(LARGEST // size, 1)


def _at(merged: Merged, index: Tensor | None) -> Merged:
    """The experts of some groups; None: all."""
    return (merged[0], merged[1]) if index is None else (merged[0][index], merged[1][index])


class SoftRouting(ChosenRouting):
    """Mixin for a MoE block of `gate`, `experts` and perhaps `base_expert`, a SwiGLU MLP of the routed width."""

    experts: nn.Module
    base_expert: Any
    curvature: CalibratedCurvature | KroneckerCurvature | None
    bent: tuple[Any, Merged] | None
    """The last result of `_cached_bent`, and the state of the parameters that it belongs to."""
    training: bool
    unrouted: float
    """s of every expert in a segment without tokens before it."""
    number: int
    """Number of routed experts."""

    def add_parts(self, config) -> None:
        """Add the parts that the stock block lacks, except `SoftExperts`; a curvature has no measured values yet."""
        choice = soft_choice(config.namex)
        assert choice is not None
        self.has_base, self.eta = choice.has_base, choice.eta
        self.number = config.num_experts  # an adapter around the gate has another value under that name
        self.unrouted = 0.0 if choice.has_base else 1 / self.number
        uses_all = not choice.has_base and routing_of(config.namex) != "stable"
        self.gate.top_k = choice.top_k or (self.number if uses_all else config.num_experts_per_tok)
        self.gate.norm_topk_prob = choice.renormalises
        self.activation = ACT2FN[config.hidden_act]  # an adapter hides the experts' own
        self.add_router(config)
        if self.has_base:
            self.base_expert = Qwen2MoeMLP(config, intermediate_size=config.moe_intermediate_size)
        self.curvature = self.bent = None
        if choice.rank is not None:
            kind = KroneckerCurvature if choice.curvature == "kronecker" else CalibratedCurvature
            self.curvature = kind(self.number, config.hidden_size, config.moe_intermediate_size, choice.rank)

    def routed(
        self,
        flat: Tensor,
        token_ids: Tensor | None,
        segments: Segments | None = None,
        memory: LayerMemory | None = None,
        base: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The routed part, ``[tokens, hidden] -> [tokens, hidden]``; with segments, zeros at padding.

        Args:
            segments: the layout of the pass; None: every token has its own merged expert.
            base: matrices by projection, in place of the stored base expert.
        """
        value, index = self.route(flat, token_ids)
        if segments is None:
            matrices, experts = self.base(flat, base), None if base is not None else self._cached_bent(flat)
            curvature = None if experts is not None else self._curvature(flat)
            return self.experts(flat, self.eta * value, index, matrices, curvature, experts)
        return self._by_segments(flat, value, index, segments, memory, base)

    def _curvature(self, like: Tensor) -> Any:
        return None if self.curvature is None else self.curvature(like)

    def _cached_bent(self, like: Tensor) -> Merged | None:
        """`bent`, computed once in evaluation. None: the pass must compute it, or there is no curvature.

        It is recomputed after an in-place change of a parameter, and dropped by `train` and `eval`. It is not cached
        under wrappers with own parameters (adapters, offloading).

        Memory: the layer's experts once more, until it is dropped.
        """
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or self.curvature is None:
            return None
        parts = [self.experts, *self.curvature.children()]
        parts += self.base_expert.children() if self.has_base else []
        holders = [module for module in parts if next(module.parameters(recurse=False), None) is not None]
        parameters = [parameter for module in parts for parameter in module.parameters()]
        plain = all(type(module) in PLAIN for module in holders) and type(self.experts) is TokenExperts
        if not plain or any(parameter.is_meta for parameter in parameters):
            return None
        key = [(parameter.data_ptr(), parameter._version) for parameter in parameters]
        if self.bent is None or self.bent[0] != key:
            experts: Any = self.experts
            self.bent = key, bent(experts.gate_up_proj, experts.down_proj, self.base(like), self.curvature(like))
        return self.bent[1]

    def train(self, mode: bool = True) -> Any:
        """As `nn.Module.train`; drops the cached experts."""
        self.bent = None
        return super().train(mode)

    def _by_segments(
        self, flat: Tensor, value: Tensor, index: Tensor, segments: Segments, memory: LayerMemory | None, base: Any
    ) -> Tensor:
        batch, new = len(segments.run), segments.run.shape[1] - segments.past
        index, value = index.view(batch, new, -1), value.view(batch, new, -1)
        if segments.past != (0 if memory is None else memory.columns):
            raise ValueError(
                f"this pass goes on after {segments.past} tokens whose routing did not arrive with it: a cache cannot "
                "be continued under gradient checkpointing, nor after a pass that broke off"
            )
        carried = None
        if memory is not None:
            index, value = memory.extend(index, value)
            carried = None if memory.merged is None else _at(memory.merged, segments.carried)
            memory.merged = None
        tokens = flat[segments.table]
        if len(segments.fresh):
            shares = self.eta * segments.shares(index, value, self.number, self.unrouted)
            matrices = self.base(flat, base)
            output, merged = self.experts(tokens, shares, matrices, carried, segments.keep, self._curvature(flat))
        elif carried is not None:
            output, merged = swiglu(tokens, carried, self.activation), _at(carried, segments.keep)
        else:  # padding only
            return torch.zeros_like(flat)
        if memory is not None:
            memory.merged = merged
        output = output.flatten(0, 1)[segments.place]
        return output.new_zeros(flat.shape).index_copy(0, segments.tokens, output)

    def base(self, like: Tensor, given: Mapping[str, Tensor] | None = None) -> Merged | None:
        """The base expert's matrices, in the layout of the experts; None: the model has no base expert.

        Args:
            like: a tensor of the pass, for an adapter.
            given: its matrices by projection; None: the stored matrices.
        """
        if not self.has_base:
            return None
        if given is None:
            given = base_matrices(self.base_expert, like)
        return torch.cat([given["gate_proj"], given["up_proj"]]), given["down_proj"]
