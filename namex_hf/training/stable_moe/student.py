"""The student of StableMoE's first stage (Dai et al. 2022), in a top-k form: what it learns, and by which losses."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.utils.hooks import RemovableHandle

from .listening import Heard, listen

AT_ONCE = 4096
"""Ids whose experts are looked up at a time."""


def balance_loss(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """``sum_i (|A_i| - n)/n sum_{t in A_i} sigmoid(h_t . e_i)``, StableMoE's balance loss, over the number of tokens.

    A_i are the tokens that have expert i among their top-k, n = tokens top_k / experts is the mean of their numbers.
    The gradient goes through the sigmoids alone: it lowers an expert that has too many tokens for those that it has,
    and raises one that has too few. StableMoE has the sum over the tokens; divided by their number, the factor before
    this loss means the same in a batch of any size.

    Args:
        logits: ``[tokens, experts]``.
    """
    chosen = logits.detach().topk(top_k, dim=-1).indices
    load = chosen.flatten().bincount(minlength=logits.shape[1]).float()
    excess = load / load.mean() - 1
    return (excess[chosen] * logits.float().gather(-1, chosen).sigmoid()).sum() / len(logits)


def distillation_loss(student_logits: torch.Tensor, logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Cross-entropy of a student against the router's top-k experts, of weight 1/k each; the mean over the tokens.

    With top-k = 1 this is StableMoE's. It has no gradient to the router.

    Args:
        student_logits, logits: ``[tokens, experts]``.
    """
    chosen = logits.detach().topk(top_k, dim=-1).indices
    return -student_logits.float().log_softmax(-1).gather(-1, chosen).mean()


class Student(nn.Module):
    """Tells from a token's id alone which experts the router of every MoE layer would choose, by ``x_id . e_i``.

    While it learns it is a part of the model, so that devices, checkpoints and distributed training know of it, and its
    losses are part of the model's; see `begin`.

    StableMoE's width of 50 makes V x 50 + N x 50 numbers a layer; a logit for every id and expert would be V x N, which
    at N = 60 is little more. All that is kept after stage 1 is a table of 4 k bytes an id and layer.

    Memory: for V = 151,936 and 24 layers 0.73 GB in float32, and as much for its gradient and for each moment of Adam.

    Args:
        width: of the embeddings of ids and experts.
        balance, distillation: factors of the two losses; StableMoE's model has one MoE layer, so they are factors of
            the mean over layers.
    """

    seen: torch.Tensor
    """Boolean ``[vocabulary]``: the ids that it has learnt from."""

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
        self._heard: list[Heard] = []
        self._listening: list[RemovableHandle] = []

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of token ids ``[n]``, ``[layers, n, experts]``."""
        rows = F.embedding(ids, self.tokens.flatten(1)).view(len(ids), *self.tokens.shape[1:])
        return torch.einsum("nlw,lew->lne", rows, self.experts)

    @torch.no_grad()
    def choose(self, ids: torch.Tensor) -> torch.Tensor:
        """The experts of token ids ``[n]``, by falling logit, ``[layers, n, top_k]``, as many as the largest top-k."""
        found = [self(some).topk(self.top_k, dim=-1).indices for some in ids.split(AT_ONCE)]
        return torch.cat(found, dim=1) if found else ids.new_empty(len(self.experts), 0, self.top_k)

    def attend(self, model: nn.Module) -> None:
        """Take part in the training passes of `model` until `leave`."""
        self.hooks = [
            model.register_forward_pre_hook(self._before),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def leave(self) -> None:
        self._stop_listening()
        while self.hooks:
            self.hooks.pop().remove()

    def _stop_listening(self) -> None:
        while self._listening:
            self._listening.pop().remove()

    def _before(self, model: nn.Module, given: Any) -> None:
        # Only while the pass lasts: gradient checkpointing runs the routers again in the backward pass.
        self._stop_listening()  # a pass may have broken off
        self._heard = []
        if model.training:
            self._listening = listen(model, self._heard)

    def _after(self, model: nn.Module, given: Any, named: dict[str, Any], outputs: Any) -> Any:
        self._stop_listening()
        heard, self._heard = self._heard, []
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
        losses = self.learn(heard, mask.flatten() != 0 if mask is not None and mask.ndim == 2 else None)
        self.losses = {name: loss.detach() for name, loss in losses.items()}
        extra = sum(factor * losses[name] for name, factor in self.factors.items())
        outputs.loss = outputs.loss + share_of_step(named) * extra
        return outputs

    def learn(self, heard: list[Heard], real: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The two losses of a pass, means over the layers; its ids are seen from now on, those of all processes.

        The load that is balanced is that of one pass of one process.

        Args:
            heard: of every layer.
            real: boolean ``[tokens]``, False at padding.
        """
        place = self.tokens.device
        ids = heard[0].ids.to(place)
        real = torch.ones_like(ids, dtype=torch.bool) if real is None else real.to(place)
        ids = ids[real]
        self.seen[ids] = True
        if distributed.is_available() and distributed.is_initialized():
            # Every process has tokens of its own, and buffers are overwritten with the first one's before each pass.
            seen = self.seen.to(torch.uint8)
            distributed.all_reduce(seen, distributed.ReduceOp.MAX)
            self.seen.copy_(seen)
        pairs = [(own, one.logits.to(place)[real]) for own, one in zip(self(ids), heard, strict=True)]
        counts = [one.linear.shape[-1] for one in heard]  # of a layer that stays sparse another than of the others
        balance = [balance_loss(logits, top_k) for (_, logits), top_k in zip(pairs, counts, strict=True)]
        distillation = [distillation_loss(*pair, top_k) for pair, top_k in zip(pairs, counts, strict=True)]
        return {"balance": torch.stack(balance).mean(), "distillation": torch.stack(distillation).mean()}


def share_of_step(named: dict[str, Any]) -> Any:
    """A pass's share of an optimiser's step by predicted tokens, as the model's loss has it; 1 where it is told none.

    Args:
        named: keyword arguments of the pass. `Trainer` gives ``num_items_in_batch``, those of the whole step.
    """
    items, labels = named.get("num_items_in_batch"), named.get("shift_labels")
    if items is None:
        return 1
    labels = named["labels"][..., 1:] if labels is None else labels
    return (labels != -100).sum() / items
