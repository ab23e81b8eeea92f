"""How evenly a router uses its experts in training, and balancing without a loss (Wang et al. 2024; DeepSeek-V3)."""

from typing import Any

import torch


class LoadHook:
    """Forward hook of a `Qwen2MoeTopKRouter`: counts what each expert gets, and may steer the choice by a bias.

    With a rate above 0 the chosen experts are the top-k of s_i + b_i, s the router's softmax values. After every
    optimiser step b_i grows by the rate where expert i got less than an equal share, and falls by it where it got more.
    The weights of the chosen experts stay s_i, so the bias has no gradient and adds none.

    The bias goes on in evaluation, where it does not change. It is no parameter, and no file of a model has it.
    """

    def __init__(self, gate: Any, rate: float = 0.0):
        """Register on a router. Args: rate, u of Wang et al.; 0: count alone."""
        self.rate = rate
        self.bias = torch.zeros(gate.num_experts, device=gate.weight.device)
        self.counts = torch.zeros(gate.num_experts, dtype=torch.int64, device=gate.weight.device)
        gate.register_forward_hook(self)

    def __call__(self, gate: Any, given: Any, answer: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits ``[tokens, experts]``, values and experts ``[tokens, top_k]`` in the place of the router's own."""
        logits, value, index = answer
        if self.rate:
            scores = logits.softmax(-1, dtype=torch.float32)
            index = (scores.detach() + self.bias).topk(gate.top_k, dim=-1).indices
            chosen = scores.gather(-1, index)
            value = (chosen / chosen.sum(-1, keepdim=True) if gate.norm_topk_prob else chosen).to(value.dtype)
        if gate.training:
            self.counts += index.flatten().bincount(minlength=len(self.counts))
        return logits, value, index

    def step(self) -> float:
        """The imbalance since the last step; moves the bias against it and begins to count anew."""
        counts = self.counts.double()
        self.bias += self.rate * (counts.mean() - counts).sign().to(self.bias)
        self.counts.zero_()
        return imbalance(counts)


def imbalance(counts: torch.Tensor) -> float:
    """Wang et al.'s MaxVio, the largest load over an equal share, less 1: from 0 (balanced) to ``experts / top_k - 1``.

    Args:
        counts: tokens that each expert got, ``[experts]``.
    """
    return float(counts.max() / counts.double().mean()) - 1


def load_hooks(model: Any, rate: float = 0.0) -> list[LoadHook]:
    """A `LoadHook` on every linear router of a model, by layer. Args: rate, as of `LoadHook`."""
    return [LoadHook(layer.mlp.gate, rate) for layer in model.model.layers if hasattr(layer.mlp, "gate")]
