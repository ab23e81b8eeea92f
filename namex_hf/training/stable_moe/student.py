"""The student of StableMoE's first stage (Dai et al. 2022), in a top-k form, and its losses."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.utils.hooks import RemovableHandle

from .routing_hooks import LayerRouting, record_routing

CHUNK = 4096
"""Number of ids whose experts are computed at once."""


def balance_loss(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """``sum_i (|A_i| - n)/n sum_{t in A_i} sigmoid(h_t . e_i)``, StableMoE's balance loss, over the number of tokens.

    A_i are the tokens with expert i among their top-k, n = tokens top_k / experts is their mean number. The gradient
    goes through the sigmoids alone. It lowers the scores of an expert with too many tokens on its tokens, and raises
    those of an expert with too few. StableMoE uses the sum over tokens; with the mean, the factor of this loss does not
    depend on the batch size.

    Args:
        logits: ``[tokens, experts]``.
    """
    chosen = logits.detach().topk(top_k, dim=-1).indices
    load = chosen.flatten().bincount(minlength=logits.shape[1]).float()
    excess = load / load.mean() - 1
    return (excess[chosen] * logits.float().gather(-1, chosen).sigmoid()).sum() / len(logits)


def distillation_loss(student_logits: torch.Tensor, logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Cross-entropy of a student against the router's top-k experts, with weight 1/k each; the mean over the tokens.

    With top-k = 1 this is StableMoE's loss. It has no gradient to the router.

    Args:
        student_logits, logits: ``[tokens, experts]``.
    """
    chosen = logits.detach().topk(top_k, dim=-1).indices
    return -student_logits.float().log_softmax(-1).gather(-1, chosen).mean()


class Student(nn.Module):
    """Predicts from a token's id alone the experts that the router of every MoE layer chooses, by ``x_id . e_i``.

    During stage 1 it is a part of the model, so that devices, checkpoints and distributed training include it, and its
    losses are part of the model's; see `begin`.

    StableMoE's width of 50 gives V x 50 + N x 50 parameters a layer. A logit for every id and expert would be V x N,
    which at N = 60 is little more. After stage 1 only a table remains, of 4 k bytes for every id and layer.

    Memory: for V = 151,936 and 24 layers 0.73 GB in float32, and as much for its gradient and for each moment of Adam.

    Args:
        width: width of the embeddings of ids and experts.
        balance, distillation: factors of the two losses' means over layers; StableMoE's model has a single MoE layer.
    """

    seen: torch.Tensor
    """Boolean ``[vocabulary]``: the ids in its training so far."""

    def __init__(
        self,
        layers: int,
        vocabulary: int,
        experts: int,
        top_k: int,
        width: int = 50,
        balance: float = 0.3,
        distillation: float = 0.3,
    ):
        super().__init__()
        self.top_k, self.factors = top_k, {"balance": balance, "distillation": distillation}
        self.tokens = nn.Parameter(0.02 * torch.randn(vocabulary, layers, width))
        self.experts = nn.Parameter(torch.randn(layers, experts, width) / width**0.5)
        self.register_buffer("seen", torch.zeros(vocabulary, dtype=torch.bool))
        self.losses: dict[str, torch.Tensor] = {}  # of the last pass, without their factors
        self.hooks: list[RemovableHandle] = []
        self._routings: list[LayerRouting] = []
        self._handles: list[RemovableHandle] = []

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of token ids ``[n]``, ``[layers, n, experts]``."""
        rows = F.embedding(ids, self.tokens.flatten(1)).view(len(ids), *self.tokens.shape[1:])
        return torch.einsum("nlw,lew->lne", rows, self.experts)

    @torch.no_grad()
    def choose(self, ids: torch.Tensor) -> torch.Tensor:
        """Experts ``[layers, n, top_k]`` of token ids ``[n]``, by falling logit, for the largest top-k of a layer."""
        chosen = [self(part).topk(self.top_k, dim=-1).indices for part in ids.split(CHUNK)]
        return torch.cat(chosen, dim=1) if chosen else ids.new_empty(len(self.experts), 0, self.top_k)

    def attend(self, model: nn.Module) -> None:
        """Add its losses to the training passes of `model`, until `leave`."""
        self.hooks = [
            model.register_forward_pre_hook(self._before),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def leave(self) -> None:
        self._stop_recording()
        while self.hooks:
            self.hooks.pop().remove()

    def _stop_recording(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _before(self, model: nn.Module, given: Any) -> None:
        # Record during the pass only: gradient checkpointing runs the routers again in the backward pass.
        self._stop_recording()  # the last pass may have failed
        self._routings = []
        if model.training:
            self._handles = record_routing(model, self._routings)

    def _after(self, model: nn.Module, given: Any, named: dict[str, Any], outputs: Any) -> Any:
        self._stop_recording()
        routings, self._routings = self._routings, []
        if not model.training:
            return None
        if outputs.loss is None:
            raise ValueError("stage 1 adds to the model's loss, which has none: found no labels; accepted: labels=...")
        if self.factors["balance"] and outputs.aux_loss is not None:
            raise ValueError(
                "output_router_logits adds the model's own balance loss to StableMoE's; accepted: "
                "output_router_logits=False, or balance=0"
            )
        mask = named.get("attention_mask")
        losses = self.learn(routings, mask.flatten() != 0 if mask is not None and mask.ndim == 2 else None)
        self.losses = {name: loss.detach() for name, loss in losses.items()}
        extra = sum(factor * losses[name] for name, factor in self.factors.items())
        outputs.loss = outputs.loss + share_of_step(named) * extra
        return outputs

    def learn(self, routings: list[LayerRouting], real: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The two losses of a pass, means over the layers; marks the ids of all processes as `seen`.

        The balanced load is that of a single pass in a single process.

        Args:
            routings: routing of every layer.
            real: boolean ``[tokens]``, False at padding.
        """
        device = self.tokens.device
        ids = routings[0].ids.to(device)
        real = torch.ones_like(ids, dtype=torch.bool) if real is None else real.to(device)
        ids = ids[real]
        self.seen[ids] = True
        if distributed.is_available() and distributed.is_initialized():
            # Processes have different tokens, and before each pass the first process's buffers overwrite all others.
            seen = self.seen.to(torch.uint8)
            distributed.all_reduce(seen, distributed.ReduceOp.MAX)
            self.seen.copy_(seen)
        pairs = [(own, routing.logits.to(device)[real]) for own, routing in zip(self(ids), routings, strict=True)]
        counts = [routing.linear.shape[-1] for routing in routings]  # a layer that stays sparse has another top-k
        balance = [balance_loss(logits, top_k) for (_, logits), top_k in zip(pairs, counts, strict=True)]
        distillation = [distillation_loss(*pair, top_k) for pair, top_k in zip(pairs, counts, strict=True)]
        return {"balance": torch.stack(balance).mean(), "distillation": torch.stack(distillation).mean()}


def share_of_step(named: dict[str, Any]) -> Any:
    """A pass's share of an optimiser step by predicted tokens, as in the model's loss; 1 without their number.

    Args:
        named: keyword arguments of the pass. `Trainer` passes ``num_items_in_batch``, the tokens of the whole step.
    """
    items, labels = named.get("num_items_in_batch"), named.get("shift_labels")
    if items is None:
        return 1
    labels = named["labels"][..., 1:] if labels is None else labels
    return (labels != -100).sum() / items
