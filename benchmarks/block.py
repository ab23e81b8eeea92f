"""Time of a MoE block by token beside the stock sparse block: ``python benchmarks/block.py``.

Forward and backward of 2,048 random tokens, random weights, at the sizes of `tiny` and of one layer of
Qwen1.5-MoE-A2.7B. Rounds alternate over the two blocks; the median of the ratios is what counts. Bar: 1.5.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from namex_hf.evaluation.table import Table
from namex_hf.models.configuration_namex import NamexQwen2MoeConfig
from namex_hf.models.modeling_namex_qwen2_moe import NamexQwen2MoeDecoderLayer

SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 128,
        "moe_intermediate_size": 80,
        "num_experts": 16,
        "shared_expert_intermediate_size": 320,
    },
    "true width": {
        "hidden_size": 2048,
        "moe_intermediate_size": 1408,
        "num_experts": 60,
        "shared_expert_intermediate_size": 5632,
    },
}


def blocks(fields: dict[str, int], implementation: str, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """The stock block and one by token, with the same weights and a base expert of random ones."""
    stock = Qwen2MoeConfig(**fields, num_experts_per_tok=4)
    patched = NamexQwen2MoeConfig(**fields, num_experts_per_tok=4, namex={"merge": "soft"})
    stock._experts_implementation = patched._experts_implementation = implementation
    with torch.device(device):
        layer = NamexQwen2MoeDecoderLayer(patched, 0)
        layer.patch(patched, 0)
        made = [Qwen2MoeSparseMoeBlock(stock).to(dtype), layer.mlp.to(dtype)]
    for block in made:
        torch.manual_seed(0)
        for _, parameter in sorted(block.named_parameters(), key=lambda pair: ("base" in pair[0], pair[0])):
            torch.nn.init.normal_(parameter, std=0.02)
    return made[0], made[1]


def seconds(block: Any, hidden: torch.Tensor, *routing: None) -> float:
    """Of a forward and a backward pass. Args: routing, what a patched block takes besides: no token ids."""

    def wait() -> None:
        if hidden.is_cuda:
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    block(hidden, *routing).sum().backward()
    wait()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--implementations", nargs="+", default=["grouped_mm", "eager"])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds, after one that is not counted")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    table = Table(["size", "experts", "stock, ms", "by token, ms", "ratio"], [])
    for size in options.sizes:
        for implementation in options.implementations:
            stock, soft = blocks(SIZES[size], implementation, dtype, options.device)
            hidden = torch.randn(1, options.tokens, SIZES[size]["hidden_size"], dtype=dtype, device=options.device)
            hidden.requires_grad_()
            rounds = [(seconds(stock, hidden), seconds(soft, hidden, None)) for _ in range(options.repeats + 1)][1:]
            one, other = (1000 * statistics.median(times) for times in zip(*rounds, strict=True))
            ratio = statistics.median(other / one for one, other in rounds)
            table.rows.append([size, implementation, f"{one:,.1f}", f"{other:,.1f}", f"{ratio:.2f}"])
    title = f"{options.tokens} tokens, {options.dtype}, {options.device}, {torch.get_num_threads()} threads"
    print("", title, "", *table.markdown(numbers=True), sep="\n")


if __name__ == "__main__":
    main()
