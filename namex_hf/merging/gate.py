"""How the logits of a router become chosen experts and their gate values, one form for all families."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

Score = Literal["softmax", "sigmoid", "sqrtsoftplus"]
SCORES: dict[Score, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: softplus(logits).sqrt(),
}


@dataclass(frozen=True)
class Gate:
    """The routing of a layer.

    Every expert has a score. A token's experts are those with the `top_k` largest sums of score and correction bias
    (Wang et al. 2024, arXiv 2408.15664), where the router has such a bias. Where experts are in groups, only those of
    the `kept_groups` best groups take part (DeepSeek-V2, arXiv 2405.04434). The gate values are the scores, without
    the bias.
    """

    top_k: int
    renormalises: bool = False  # whether the gate values of a token are divided by their sum
    score: Score = "softmax"
    scale: float = 1.0  # of the gate values, in the end
    groups: int = 1  # of experts, of equal size and in order
    kept_groups: int = 1
    best: int = 1  # a group counts as the sum of its so many largest values

    def __call__(self, logits: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gate values and experts, ``[tokens, top_k]`` each; the values are differentiable in the logits.

        Args:
            logits: ``[tokens, experts]``.
            bias: the correction bias, ``experts`` numbers in any shape; None: there is none.
        """
        scores = SCORES[self.score](logits)
        choice = scores if bias is None else scores.detach() + bias.flatten().to(scores)
        if self.kept_groups < self.groups:
            choice = self._of_best_groups(choice)
        index = choice.topk(self.top_k, dim=-1).indices
        value = scores.gather(-1, index)
        if self.renormalises:
            value = value / value.sum(-1, keepdim=True)
        return value if self.scale == 1 else value * self.scale, index

    def _of_best_groups(self, choice: Tensor) -> Tensor:
        """The same numbers, minus infinity outside each token's best groups."""
        grouped = choice.detach().unflatten(-1, (self.groups, -1))
        best = grouped.topk(self.best, dim=-1).values.sum(-1).topk(self.kept_groups, dim=-1).indices
        out = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=choice.device).scatter(-1, best, False)
        limited: Tensor = grouped.masked_fill(out[..., None], -torch.inf).view_as(choice)
        return limited

    def of(self, experts: int) -> "Gate":
        """That of a layer with fewer experts, which are in no groups: a merged expert belongs to several."""
        return replace(self, top_k=min(self.top_k, experts), groups=1, kept_groups=1)
