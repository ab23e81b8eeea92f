"""Routers in place of the pretrained linear router (``routing: cosine`` and ``stable``).

Both return top-k softmax values and their experts, as `Qwen2MoeTopKRouter` does, so every merge can use them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_namex import routing_of


class CosineRouter(nn.Module):
    """``softmax(scale cos(P h, e_i))`` over the experts, then top-k (X-MoE, Chi et al. 2022, eq. 3).

    P and e_i come from the pretrained router W = U S V^T: ``P = V^T``, ``e_i = (U S)_i``. So P h . e_i = W_i h, and the
    cosine only divides by the two norms. `scale` is one over X-MoE's temperature. All three are trainable.
    """

    def __init__(self, experts: int, hidden: int, top_k: int, norm_topk_prob: bool):
        super().__init__()
        rank = min(experts, hidden)
        self.top_k, self.norm_topk_prob = top_k, norm_topk_prob
        self.projection = nn.Parameter(torch.empty(rank, hidden))
        self.embeddings = nn.Parameter(torch.empty(experts, rank))
        self.scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set random directions. Tensors loaded from a checkpoint are not changed."""
        init.normal_(self.projection, std=0.02)
        init.normal_(self.embeddings, std=0.02)
        init.constant_(self.scale, 10.0)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[tokens, hidden]`` to logits ``[tokens, experts]``, values and experts ``[tokens, top_k]``.

        Cosines are computed in float32: in bfloat16 similar experts would tie.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            projected = hidden_states.float() @ self.projection.float().T
            cosines = F.normalize(projected, dim=-1) @ F.normalize(self.embeddings.float(), dim=-1).T
            logits = self.scale.float() * cosines
        value, index = logits.softmax(-1).topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            value = value / value.sum(-1, keepdim=True)
        return logits.to(hidden_states.dtype), value.to(hidden_states.dtype), index


class StableRouter(nn.Module):
    """The second stage of StableMoE (Dai et al. 2022) in a top-k form: a token's id alone determines its experts.

    The student is frozen, so its decisions are stored as a table: the top-k experts of every assigned id. A gate value
    is still the pretrained router's softmax value at that expert, and trainable. For an id without an assignment the
    router itself chooses. With top-k = 1 and a sigmoid in place of the softmax this is StableMoE's eq. 8.

    Memory: 4 bytes for every id and chosen expert; 2.4 MB a layer for a vocabulary of 151,936 and top-4. (int16 would
    suffice, but data-parallel training sends buffers, and gloo does not support it.)
    """

    assignment: Tensor
    """int32 ``[vocabulary, top_k]``; rows of -1 for ids without an assignment."""

    def __init__(self, vocabulary: int, top_k: int, norm_topk_prob: bool):
        super().__init__()
        self.norm_topk_prob = norm_topk_prob
        self.register_buffer("assignment", torch.empty(vocabulary, top_k, dtype=torch.int32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Assign no id: linear routing. Tensors loaded from a checkpoint are not changed."""
        init.constant_(self.assignment, -1)

    def forward(self, logits: Tensor, value: Tensor, index: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Values and experts ``[tokens, top_k]`` in place of the router's own.

        Args:
            logits: ``[tokens, experts]`` of the pretrained router.
            value: its top-k softmax values; index: their experts; both ``[tokens, top_k]``.
            token_ids: an id for every token, of any shape.
        """
        table, ids = self.assignment, token_ids.flatten()
        chosen = table[ids.clamp(max=len(table) - 1)].long()
        assigned = ((chosen[:, 0] >= 0) & (ids < len(table)))[:, None]
        chosen_value = logits.softmax(-1, dtype=torch.float32).gather(-1, chosen.clamp(min=0))
        if self.norm_topk_prob:
            chosen_value = chosen_value / chosen_value.sum(-1, keepdim=True)
        return torch.where(assigned, chosen_value.to(value.dtype), value), torch.where(assigned, chosen, index)

    @torch.no_grad()
    def resize(self, vocabulary: int) -> None:
        """Change the size of the vocabulary; new ids get no assignment."""
        remaining = self.assignment[:vocabulary]
        added = remaining.new_full((vocabulary - len(remaining), remaining.shape[1]), -1)
        self.assignment = torch.cat([remaining, added])


class ChosenRouting:
    """Mixin for a MoE block with a `gate`: tokens are routed to experts as the recipe states.

    Under ``cosine`` the pretrained `gate` stays in the model and in saved files, but is not used. Its weight is then a
    buffer: data-parallel training fails for a parameter without gradient.
    """

    gate: Any

    def add_router(self, config) -> None:
        """Add the router that the recipe names, with the top-k and the renormalisation of `gate`."""
        self.routing = routing_of(config.namex)
        selection = self.gate.top_k, self.gate.norm_topk_prob
        if self.routing == "cosine":
            self.cosine_router = CosineRouter(config.num_experts, config.hidden_size, *selection)
            weight = self.gate.weight.detach()
            del self.gate.weight
            self.gate.register_buffer("weight", weight)
        elif self.routing == "stable":
            self.stable_router = StableRouter(config.vocab_size, *selection)

    def route(self, flat: Tensor, token_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Top-k values and experts, both ``[tokens, top_k]``, of hidden states ``[tokens, hidden]``."""
        if self.routing == "cosine":
            return self.cosine_router(flat)[1:]
        logits, value, index = self.gate(flat)
        if self.routing == "linear":
            return value, index
        if token_ids is None:
            raise ValueError("routing 'stable' assigns experts by token id: found inputs_embeds; accepted: input_ids")
        return self.stable_router(logits, value, index, token_ids)
