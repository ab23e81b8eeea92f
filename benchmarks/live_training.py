"""What live propagation and its bargain cost in training (as Table 12): ``python benchmarks/live_training.py``.

Random Qwen2-MoE models (`--layers` MoE layers of N experts of 256 beside hidden 512, top-2, float32), patched with
NAMEx-Full (``merge: residual``, gamma 0.6), once for every number of experts. Clocked, interleaved, the best of the
rounds: an optimiser step over `--tokens` tokens (forward, backward, AdamW) with the bases stored, and live; and the
bargain of all layers (Gram matrices, solution, propagation) with games in every Delta-l-th layer, L being the first
alone. As in the paper a share is that of the bargain in a step that is followed by one. "solving" is the same of the
equations alone, in all layers.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from namex_hf import Recipe, patch_model
from namex_hf.evaluation.table import Table
from namex_hf.merging.experts import grams
from namex_hf.merging.weightings import WEIGHTINGS
from namex_hf.recipe import Game
from namex_hf.training.bargain import rebargain
from namex_hf.training.gathered import base_of, experts_of
from namex_hf.training.live import go_live, moe_blocks, settle

GAMMA = 0.6  # at 1 the first base gets no gradient from later layers
RECIPES = {
    "1": Recipe(gamma=GAMMA),
    "2": Recipe(gamma=GAMMA, every=2),
    "5": Recipe(gamma=GAMMA, every=5),
    "L": Recipe(gamma=GAMMA, method="namex"),
}
FORMS = ("stored", "live")


class Bench:
    """One model, and the best time of everything that is done with it."""

    def __init__(self, experts: int, layers: int, tokens: int):
        torch.manual_seed(0)
        config = Qwen2MoeConfig(
            vocab_size=512,
            hidden_size=512,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=8,
            num_experts=experts,
            num_experts_per_tok=2,
            moe_intermediate_size=256,
            shared_expert_intermediate_size=256,
        )
        self.model: Any = patch_model(AutoModelForCausalLM.from_config(config, dtype=torch.float32), RECIPES["1"])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.ids = torch.randint(0, config.vocab_size, (max(1, tokens // 512), min(512, tokens)))
        blocks = moe_blocks(self.model)
        self.gram = torch.cat([grams(experts_of(block), base_of(block), "matrix") for block in blocks])
        self.best: dict[tuple[str, str], float] = defaultdict(lambda: float("inf"))

    def step(self) -> None:
        self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def round(self) -> None:
        """Everything once, in both forms."""
        for form in FORMS:
            if form == "live":
                go_live(self.model)
            self.clock(form, "step", self.step)
            self.clock(form, "solving", lambda: WEIGHTINGS["nash"](self.gram, Game(), torch.float32))
            for name, recipe in RECIPES.items():
                self.clock(form, name, partial(rebargain, self.model, recipe))
        settle(self.model)

    def clock(self, form: str, name: str, work: Callable[[], Any]) -> None:
        start = time.perf_counter()
        work()
        self.best[form, name] = min(self.best[form, name], time.perf_counter() - start)

    def row(self, form: str) -> list[str]:
        """Cells of a table's row, without the first."""
        step = self.best[form, "step"]

        def share(name: str, every: int = 1) -> str:
            seconds = self.best[form, name] / every
            return f"{100 * seconds / (step + seconds):.2f} %"

        shares = [share("solving"), *(share(name) for name in RECIPES), share("1", 10)]
        return [form, f"{step:.2f}", f"{step / self.best['stored', 'step']:.3f}", *shares]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    shares = [f"Delta-l = {name}" for name in RECIPES]
    table = Table(["N", "bases", "step, s", "to stored", "solving", *shares, "1, every 10 steps"], [])
    for experts in options.experts:
        bench = Bench(experts, options.layers, options.tokens)
        for _ in range(options.rounds):
            bench.round()
        for form in FORMS:
            table.rows.append([str(experts), *bench.row(form)])
    title = f"{options.layers} layers, {options.tokens} tokens a step"
    print("", title, "", *table.markdown(numbers=True), sep="\n")


if __name__ == "__main__":
    main()
