"""How tokens find experts beside the pretrained linear router (``routing: cosine`` and ``stable``).

Both hand out what `Qwen2MoeTopKRouter` does, top-k softmax values and the experts that they belong to, so every merge
reads them alike.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .configuration_namex import routing_of


class CosineRouter(nn.Module):
    """``softmax(scale cos(P h, e_i))`` over the experts, then top-k (X-MoE, Chi et al. 2022, eq. 3).

    P and e_i come from the pretrained router W = U S V^T: ``P = V^T``, ``e_i = (U S)_i``, so that P h . e_i = W_i h and
    only the two norms are gone. `scale` is one over X-MoE's temperature. All three train.
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
        """Random directions. What a checkpoint has filled stays."""
        init.normal_(self.projection, std=0.02)
        init.normal_(self.embeddings, std=0.02)
        init.constant_(self.scale, 10.0)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``[tokens, hidden]`` to logits ``[tokens, experts]``, values and experts ``[tokens, top_k]``.

        Angles are taken in float32: in bfloat16 neighbouring experts would tie.
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
    """The second stage of StableMoE (Dai et al. 2022) in a top-k form: a token's id alone says which experts it gets.

    The student is frozen, so all that is kept of it is what it decides: the top-k experts of every id that it has seen.
    A gate value stays the pretrained router's softmax value at that expert, and trains. Where an id was never seen the
    router's own choice stands. With top-k = 1 and a sigmoid in the place of the softmax this is StableMoE's eq. 8.

    Memory: 4 bytes an id and chosen expert; at a vocabulary of 151,936 and top-4, 2.4 MB a layer. (int16 would do, but
    data-parallel training sends buffers, and gloo does not know it.)
    """

    assignment: torch.Tensor
    """int32 ``[vocabulary, top_k]``; -1 throughout where an id was not seen."""

    def __init__(self, vocabulary: int, top_k: int, norm_topk_prob: bool):
        super().__init__()
        self.norm_topk_prob = norm_topk_prob
        self.register_buffer("assignment", torch.empty(vocabulary, top_k, dtype=torch.int32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """No id seen: linear routing. What a checkpoint has filled stays."""
        init.constant_(self.assignment, -1)

    def forward(
        self, logits: torch.Tensor, value: torch.Tensor, index: torch.Tensor, token_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and experts ``[tokens, top_k]`` in the place of the router's own.

        Args:
            logits: ``[tokens, experts]`` of the pretrained router, with the values and experts that it chose.
            token_ids: as many, of any shape.
        """
        table, ids = self.assignment, token_ids.flatten()
        chosen = table[ids.clamp(max=len(table) - 1)].long()
        seen = ((chosen[:, 0] >= 0) & (ids < len(table)))[:, None]
        own = logits.softmax(-1, dtype=torch.float32).gather(-1, chosen.clamp(min=0))
        if self.norm_topk_prob:
            own = own / own.sum(-1, keepdim=True)
        return torch.where(seen, own.to(value.dtype), value), torch.where(seen, chosen, index)

    @torch.no_grad()
    def resize(self, vocabulary: int) -> None:
        """Follow a vocabulary that grows or shrinks; new ids were never seen."""
        kept = self.assignment[:vocabulary]
        more = kept.new_full((vocabulary - len(kept), kept.shape[1]), -1)
        self.assignment = torch.cat([kept, more])


class ChosenRouting:
    """Mixin for a MoE block of a `gate`: tokens find experts as the recipe says.

    Under ``cosine`` the pretrained `gate` stays in the model, and in what is saved of it, but is not asked: its weight
    is a buffer then, as data-parallel training takes offence at a parameter without gradient.
    """

    gate: Any
    routing: str
    cosine_router: CosineRouter
    stable_router: StableRouter

    def add_router(self, config) -> None:
        """Give the block what its routing needs beyond `gate`, whose top-k and renormalisation hold for it too."""
        self.routing = routing_of(config.namex)
        form = self.gate.top_k, self.gate.norm_topk_prob
        if self.routing == "cosine":
            self.cosine_router = CosineRouter(config.num_experts, config.hidden_size, *form)
            weight = self.gate.weight.detach()
            del self.gate.weight
            self.gate.register_buffer("weight", weight)
        elif self.routing == "stable":
            self.stable_router = StableRouter(config.vocab_size, *form)

    def route(self, flat: torch.Tensor, token_ids: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and experts of ``[tokens, hidden]``, both ``[tokens, top_k]``."""
        if self.routing == "cosine":
            return self.cosine_router(flat)[1:]
        logits, value, index = self.gate(flat)
        if self.routing == "linear":
            return value, index
        if token_ids is None:
            raise ValueError("routing 'stable' assigns experts by token id: found inputs_embeds; accepted: input_ids")
        return self.stable_router(logits, value, index, token_ids)


__all__ = ["ChosenRouting", "CosineRouter", "StableRouter"]
