"""Train a packaged model: ``tiny``, ``tiny-deepseek`` or ``tiny-qwen3``. Resumes where it was stopped.

    python packaged/train.py tiny --work /tmp/packaged        # writes the model folder to /tmp/packaged/tiny

Fixed seeds; a step's batch depends on its number alone. Every decoder layer has its own auxiliary loss: one pooled
over the layers lets single experts starve in models this small.
"""

import argparse
import json
import math
import time
from pathlib import Path

import corpora
import data
import torch
from save import publish
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

from namex_hf.models.configuration_deepseek import DeepseekConfig
from namex_hf.models.modeling_deepseek import DeepseekForCausalLM, expert_balance_loss

CONTEXT = 1024
COMMON = {
    "vocab_size": data.VOCABULARY,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": CONTEXT,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "num_hidden_layers": 5,
    "moe_intermediate_size": 80,
    "num_experts_per_tok": 4,
    "norm_topk_prob": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.04,
}
QWEN3 = {  # routed experts alone, values that sum to one, fewer key heads than query heads, and a head of its own
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": False,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}
SEEDS = {"tiny": 11, "tiny-deepseek": 12, "tiny-qwen3": 13}
BALANCE = 0.01  # times the mean over layers of a loss that is 1 when the load is even
PEAK, FLOOR, WARM_UP, DECAY = 3e-3, 1e-4, 200, 0.1
LONG_SHARE = 0.25  # of the steps, at the end, that see the whole context


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(SEEDS[name])
    if name == "tiny":
        config = Qwen2MoeConfig(
            **COMMON,
            num_experts=16,
            shared_expert_intermediate_size=160,
            intermediate_size=400,
            router_aux_loss_coef=0.001,
        )
        return Qwen2MoeForCausalLM(config)
    if name == "tiny-qwen3":
        return Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**COMMON | QWEN3, num_experts=16, intermediate_size=400, router_aux_loss_coef=0.001)
        )
    return DeepseekForCausalLM(
        DeepseekConfig(**COMMON, n_routed_experts=16, n_shared_experts=2, intermediate_size=480, aux_loss_alpha=0.001)
    )


def balance_loss(name: str, router_logits: tuple[torch.Tensor, ...], batch: int, top_k: int) -> torch.Tensor:
    """Mean over the layers of the load-balancing loss of each, 1 when every expert has its share."""
    if name == "tiny-deepseek":
        return expert_balance_loss(router_logits, batch, top_k, sequence_level=False) / len(router_logits)
    layers = [load_balancing_loss_func((logits,), logits.shape[-1], top_k) / top_k for logits in router_logits]
    return torch.stack(layers).mean()


def learning_rate(step: int, steps: int) -> float:
    if step < WARM_UP:
        return PEAK * (step + 1) / WARM_UP
    return FLOOR + (PEAK - FLOOR) * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / (steps - WARM_UP)))


def optimizer_of(model: PreTrainedModel) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), fused=True)


@torch.no_grad()
def validate(model: PreTrainedModel, held_out: dict[str, torch.Tensor]) -> dict[str, float]:
    """Loss in nats a token on the opening 16 windows of each domain's held-out text."""
    model.eval()
    losses = {name: float(model(input_ids=ids, labels=ids).loss) for name, ids in held_out.items()}
    model.train()
    return losses


def train(name: str, work: Path, steps: int, tokens: int, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    out = work / name
    out.mkdir(parents=True, exist_ok=True)
    rows = data.streams(work / "sources", tokenizer)
    held_out = {
        domain: torch.tensor(tokenizer(text, verbose=False).input_ids[: 16 * 256]).view(16, 256)
        for domain, text in data.held_out(work / "sources").items()
    }
    model, state = build(name), out / "state.pt"
    print(f"{name}: {model.num_parameters():,} parameters; { {n: len(r) for n, r in rows.items()} } tokens", flush=True)
    optimizer, step, seconds = optimizer_of(model), 0, 0.0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, seconds = saved["step"], saved["seconds"]
    log, clock = out / "training_log.jsonl", time.perf_counter() - seconds
    model.train()
    while step < steps:
        length = CONTEXT if step >= steps * (1 - LONG_SHARE) else 256
        ids = data.batch(rows, step, tokens // length, length, SEEDS[name])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        result = model(input_ids=ids, output_router_logits=True)
        logits = result.logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        balance = balance_loss(name, result.router_logits, len(ids), model.config.num_experts_per_tok)
        (loss + BALANCE * balance).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 50 == 0 or step == steps:
            record: dict[str, object] = {
                "step": step,
                "tokens": step * tokens,
                "minutes": round((time.perf_counter() - clock) / 60, 2),
                "loss": round(loss.item(), 4),
                "balance": round(balance.item(), 4),
                "gradient_norm": round(norm.item(), 3),
                "learning_rate": round(learning_rate(step - 1, steps), 6),
            }
            if step % 400 == 0 or step == steps:
                record["held_out_loss"] = {k: round(v, 4) for k, v in validate(model, held_out).items()}
                seconds = time.perf_counter() - clock
                torch.save(
                    {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "step": step,
                        "seconds": seconds,
                    },
                    state.with_suffix(".part"),
                )
                state.with_suffix(".part").replace(state)
            with log.open("a") as file:
                print(json.dumps(record), file=file)
            print(json.dumps(record), flush=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(SEEDS))
    parser.add_argument("--work", type=Path, default=Path("packaged/work"), help="sources, states, result")
    parser.add_argument("--steps", type=int, default=3600, help="of the packaged models: 3600")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens a step")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    corpora.fetch(arguments.work / "sources")
    tokenizer = data.build_tokenizer(arguments.work / "sources", CONTEXT)
    model = train(arguments.name, arguments.work, arguments.steps, arguments.tokens, tokenizer)
    out = arguments.work / arguments.name
    publish(model.to(torch.bfloat16), out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
