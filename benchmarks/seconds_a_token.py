"""What a smaller model saves in time: ``python benchmarks/seconds_a_token.py``.

Random weights of a published shape with few layers: the original, half the width of its experts, half of its experts.
Their rounds alternate in one run; medians. For batches of 1 and 16: prefill and decoding in milliseconds a token, and
how many times faster than the original. Products a token are multiplications of the matrices that a token passes
through, in millions, vocabulary apart. Random routers spread tokens over nearly all experts.
"""

import argparse
import statistics
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen3MoeConfig

from namex_hf.evaluation.speed import speed
from namex_hf.evaluation.table import Table

SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen1.5-moe": (
        Qwen2MoeConfig,
        {
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
        },
    ),
    "qwen3-30b-a3b": (
        Qwen3MoeConfig,
        {
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
        },
    ),
}
VOCABULARY = 1024
COMMON = {"hidden_size": 2048, "vocab_size": VOCABULARY, "max_position_embeddings": 2048, "eos_token_id": None}


def models_of(shape: str, layers: int) -> dict[str, Any]:
    kind, fields = SHAPES[shape]
    halves = {
        "original": {},
        "half the width": {"moe_intermediate_size": fields["moe_intermediate_size"] // 2},
        "half the experts": {"num_experts": fields["num_experts"] // 2},
    }
    made = {}
    for name, half in halves.items():
        config = kind(**COMMON, **{**fields, **half}, num_hidden_layers=layers)
        made[name] = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return made


def products(model: Any) -> float:
    """Millions a token."""
    config, found = model.config, 0
    for name, weight in model.model.layers.named_parameters():
        if weight.ndim == 3:
            found += weight[0].numel() * config.num_experts_per_tok
        elif weight.ndim == 2 and "norm" not in name:
            found += weight.numel()
    return found / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen1.5-moe", help="default: %(default)s")
    numbers = {"layers": 1, "prompt": 512, "new": 16, "repeats": 3}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    options = parser.parse_args()
    models = models_of(options.shape, options.layers)
    tokens = torch.randint(VOCABULARY, (4096,), generator=torch.Generator().manual_seed(0))
    rounds: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _ in range(options.repeats + 1):  # the first is not counted
        for batch in (1, 16):
            for name, model in models.items():
                found = speed(model, tokens, batch, options.prompt // (4 if batch > 1 else 1), options.new, repeats=1)
                rounds.setdefault((name, batch), []).append((1000 / found.prefill, 1000 / found.decode))
    times = {key: [statistics.median(one) for one in zip(*each[1:], strict=True)] for key, each in rounds.items()}
    titles = ["", "products a token, M"]
    titles += [f"{what}, batch {batch}: ms a token" for batch in (1, 16) for what in ("prefill", "decoding")]
    rows = []
    for name, model in models.items():
        cells = [
            f"{own:.2f} ({first / own:.2f} x)"
            for batch in (1, 16)
            for own, first in zip(times[name, batch], times["original", batch], strict=True)
        ]
        rows.append([name, f"{products(model):.1f}", *cells])
    print(f"{options.shape}, {options.layers} layer(s), bfloat16, {torch.get_num_threads()} threads")
    print("\n".join(Table(titles, rows).markdown(numbers=True)))


if __name__ == "__main__":
    main()
