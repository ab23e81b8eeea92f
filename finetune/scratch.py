"""Small models trained from nothing under the methods of the paper's Table 1, the base expert live where it walks."""

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from expert_load import load_hooks
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from namex_hf.evaluation.perplexity import window_losses
from namex_hf.patching.live import patch_model
from namex_hf.recipe import Recipe
from namex_hf.training.bargain import rebargain, summary
from namex_hf.training.live import go_live

Batches = Callable[[int], torch.Tensor]
"""Token ids ``[sequences, length]`` of a step, by its number."""


@dataclass(frozen=True)
class Row:
    """A row of Table 1."""

    recipe: Recipe
    top_k: int = 1


def _soft(method: str, momentum: bool = False) -> Row:
    kind, beta = ("complex", "0.9,0.2618") if momentum else ("none", None)
    top_k = None if method == "smear" else 1
    return Row(Recipe(merge="soft", routing_span="all", method=method, top_k=top_k, momentum=kind, beta=beta))


ROWS: dict[str, Row] = {
    "SMoE (Top-1)": Row(Recipe(method="smoe")),
    "SMoE (Top-2)": Row(Recipe(method="smoe"), top_k=2),
    "SMEAR": _soft("smear"),
    "CAMEx": _soft("camex"),
    "EP-CAMEx": _soft("ep-camex"),
    "NAMEx": _soft("namex"),
    "NAMEx-Full": _soft("namex-full"),
    "EP-CAMEx-Mom": _soft("ep-camex", momentum=True),
    "NAMEx-Mom": _soft("namex", momentum=True),
    "NAMEx-Full-Mom": _soft("namex-full", momentum=True),
}
"""The paper does not say which phase momentum had; pi/12 is the one with the highest scores in its Table 5."""


@dataclass(frozen=True)
class Schedule:
    """What all rows have in common, so that tokens are equal."""

    steps: int = 600
    sequences: int = 8
    length: int = 256
    peak: float = 3e-3
    warm_up: int = 50
    balance: float = 0.01  # factor of the balance loss, which is 1 when experts are used alike
    bargain_every: int = 10  # optimiser steps
    score_tokens: int = 1 << 30  # of each text, from its beginning
    balancing: str = "loss"
    bias_rate: float = 0.001  # of `balance.LoadHook`, where balancing is by bias
    router: str = "softmax_topk"
    shared_expert: str = "gated"
    eta: float = 1.0  # step of eq. 9, in rows that have a base expert

    def learning_rate(self, step: int) -> float:
        """Linear up, a cosine down to nothing."""
        if step < self.warm_up:
            return self.peak * (step + 1) / self.warm_up
        return self.peak * 0.5 * (1 + math.cos(math.pi * (step - self.warm_up) / max(1, self.steps - self.warm_up)))


CHOICES = {
    "balancing": ("loss", "bias"),
    "router": ("softmax_topk", "topk_softmax"),
    "shared_expert": ("gated", "none"),
}
"""Values of the schedule's fields that are words; the paper's appendix D.1 has the second router and no shared expert.

``topk_softmax`` is the softmax of the top-k logits alone: the top-k values of the softmax, divided by their sum. With
top-1 the value is 1 whatever the logits are, so the router learns from the balance loss alone; and with eta = 1 the
values that sum to 1 take the base out of eq. 9, where a token has its own merged expert.
"""
DEFAULT = Schedule()


class NoSharedExpert(nn.Module):
    """In the place of a shared expert: adds nothing."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Zeros in the shape of ``[tokens, hidden]``."""
        return torch.zeros_like(hidden_states)


def new_model(
    row: Row, seed: int, vocabulary: int, context: int, experts: int = 16, schedule: Schedule = DEFAULT
) -> Any:
    """A random Qwen2-MoE, patched as the row has it, and live where its base walks.

    Embeddings, attention and experts are the same for all rows of a seed. The shared expert has the routed width, and
    the first base begins as its copy (`base: shared`), also where the shared expert is then left out.

    Args:
        schedule: what says which router, whether a shared expert stays, and eta.
    """
    torch.manual_seed(seed)
    config = Qwen2MoeConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=experts,
        num_experts_per_tok=row.top_k,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        intermediate_size=256,
        max_position_embeddings=context,
        norm_topk_prob=False,
        tie_word_embeddings=True,
        initializer_range=0.04,
        use_cache=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if row.recipe.own_class:
        recipe = row.recipe
        if recipe.merge.has_base:
            recipe = Recipe(**{**recipe.to_dict(), "eta": schedule.eta})
        patch_model(model, recipe)
    for layer in model.model.layers:
        layer.mlp.gate.norm_topk_prob = schedule.router == "topk_softmax"
        if schedule.shared_expert == "none":
            layer.mlp.shared_expert = NoSharedExpert()
            layer.mlp.shared_expert_gate.requires_grad_(False)
    return go_live(model) if row.recipe.merge.propagates else model


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Switch Transformer's (eq. 4 to 6), layer by layer, then the mean; 1 when experts are used alike.

    Pooled over the layers, as transformers has it, it lets single experts starve in models this small.

    Args:
        router_logits: ``[tokens, experts]`` of each layer.
    """
    losses = []
    for logits in router_logits:
        values = logits.float().softmax(-1)
        count = torch.zeros_like(values).scatter_(1, values.topk(top_k, dim=-1).indices, 1.0)
        losses.append(logits.shape[-1] * (count.mean(0) / top_k * values.mean(0)).sum())
    return torch.stack(losses).mean()


def train(model: Any, row: Row, batches: Batches, schedule: Schedule, advance: Callable[[], None]) -> dict[str, Any]:
    """Train in place, and say what happened on the way.

    Args:
        advance: called after every step.

    Returns:
        ``loss`` of every step, nats a token; ``imbalance`` of every step, mean over layers; ``bargain``,
        `bargain.summary` after every n-th step; ``seconds``.
    """
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=schedule.peak, betas=(0.9, 0.95))
    by_bias = schedule.balancing == "bias"
    hooks = load_hooks(model, schedule.bias_rate if by_bias else 0.0)
    losses, loads, bargains, start = [], [], [], time.perf_counter()
    model.train()
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step)
        ids = batches(step)
        output = model(input_ids=ids, output_router_logits=True, use_cache=False)
        loss = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        balance = 0.0 if by_bias else schedule.balance * balance_loss(output.router_logits, row.top_k)
        (loss + balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 5))
        loads.append(round(sum(hook.step() for hook in hooks) / len(hooks), 5))
        if row.recipe.merge.propagates and (step + 1) % schedule.bargain_every == 0:
            bargains.append({"step": step + 1, **summary(rebargain(model, row.recipe))})
        advance()
    return {"loss": losses, "imbalance": loads, "bargain": bargains, "seconds": round(time.perf_counter() - start, 2)}


def score(model: Any, tokenizer: Any, ids: torch.Tensor, window: int) -> dict[str, float]:
    """Perplexity a token, and bits per byte, of token ids ``[n]`` but each window's first."""
    losses = window_losses(model, ids, window)
    size = sum(len(tokenizer.decode(row[1:]).encode()) for row in ids[: len(losses) * window].view(-1, window))
    nats = float(losses.sum()) * (window - 1)
    return {"perplexity": math.exp(float(losses.mean())), "bits_per_byte": nats / math.log(2) / size}


def mixed_batches(texts: Mapping[str, torch.Tensor], schedule: Schedule, seed: int) -> Batches:
    """Windows of texts drawn alike: a function of the step alone, the same for all rows of a seed.

    Args:
        texts: token ids ``[n]`` by name, each longer than a sequence.
    """
    names = sorted(texts)

    def batch(step: int) -> torch.Tensor:
        draw = random.Random(seed * 1_000_003 + step)
        rows = [texts[draw.choice(names)] for _ in range(schedule.sequences)]
        starts = [draw.randrange(len(row) - schedule.length) for row in rows]
        return torch.stack([r[s : s + schedule.length] for r, s in zip(rows, starts, strict=True)]).long()

    return batch


def run(
    name: str,
    seed: int,
    tokenizer: Any,
    texts: Mapping[str, torch.Tensor],
    held_out: Mapping[str, torch.Tensor],
    schedule: Schedule,
    advance: Callable[[], None],
) -> dict[str, Any]:
    """One row of the table with one seed: train and score; all of it as plain values.

    Args:
        name: of `ROWS`.
        held_out: token ids ``[n]`` to score on, by name.
    """
    row = ROWS[name]
    model = new_model(row, seed, len(tokenizer), schedule.length, schedule=schedule)
    found = train(model, row, mixed_batches(texts, schedule, seed), schedule, advance)
    return {
        "row": name,
        "seed": seed,
        "schedule": asdict(schedule),
        "trained_on": {part: len(ids) for part, ids in texts.items()},
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "scores": {
            part: score(model, tokenizer, ids[: schedule.score_tokens], schedule.length)
            for part, ids in held_out.items()
        },
        **found,
    }
