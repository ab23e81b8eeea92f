"""What the bargain costs in training: ``python benchmarks/bargain_training.py [--tokens 2048]``.

A decoder layer of the true width of Qwen1.5-MoE-A2.7B (60 experts of 1408 beside hidden 2048; random weights, float32),
patched with the default recipe. One optimiser step over `--tokens` tokens (forward, backward, AdamW), the solution of
its three games, and what the trainer's callback does (Gram matrices, solution, propagation), interleaved, as shares of
the step; the best of the rounds. Embeddings and head are small, so nearly all of the step is the layer's.
"""

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from namex_hf import Recipe, nash_bargaining, patch_model
from namex_hf.evaluation.table import Table
from namex_hf.merging.experts import grams
from namex_hf.training.bargain import rebargain
from namex_hf.training.gathered import base_of, experts_of

EVERY = (1, 10, 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--experts", type=int, default=60)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = Qwen2MoeConfig(num_hidden_layers=1, num_experts=options.experts, vocab_size=512)
    model = patch_model(AutoModelForCausalLM.from_config(config, dtype=torch.float32), Recipe())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(0, config.vocab_size, (max(1, options.tokens // 512), min(512, options.tokens)))
    block = model.model.layers[0].mlp
    gram = grams(experts_of(block), base_of(block), "matrix")

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    works = {
        "step": step,
        "solve": lambda: nash_bargaining(gram),
        "Gram, solve, propagate": lambda: rebargain(model, Recipe()),
    }
    best = dict.fromkeys(works, float("inf"))
    for _ in range(options.rounds):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - start)
    table = Table(["", "seconds", *(f"share, every {n}" for n in EVERY)], [])
    for name in ("solve", "Gram, solve, propagate"):
        shares = [f"{100 * best[name] / n / best['step']:.3f} %" for n in EVERY]
        table.rows.append([name, f"{best[name]:.4f}", *shares])
    title = f"a layer, {ids.numel()} tokens a step ({best['step']:.2f} s)"
    print("", title, "", *table.markdown(numbers=True), sep="\n")


if __name__ == "__main__":
    main()
