"""Speed and memory of a patched model's forward pass at true layer width: ``python benchmarks/forward.py``.

Random weights of a Qwen2-MoE (hidden 2048, 60 experts of 1408, top-4, shared expert 5632) with few layers and a small
vocabulary. In one run, rounds alternating over the forms, medians quoted:

* prefill: tokens a second of one pass over the prompt that fills a cache;
* decode: tokens a second of single-token passes after it, all rows counted, merges at segment boundaries included;
* memory a sequence: bytes of the cache after the last token, keys and values and what the form adds to them.

The forms share one set of weights; `grouped, 1 expert` has its own. Random routers spread tokens over nearly all
experts, as a mean over many tokens of a trained one does.
"""

import argparse
import statistics
import time
from typing import Any, NamedTuple

import torch
from rich.console import Console
from transformers import DynamicCache, Qwen2MoeConfig, Qwen2MoeForCausalLM

from namex_hf.evaluation.table import Table
from namex_hf.models import NamexQwen2MoeConfig, NamexQwen2MoeForCausalLM
from namex_hf.models.arguments import Arguments


class Round(NamedTuple):
    prefill: float
    decode: float
    cache_bytes: int
    added_bytes: int


def sizes(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "hidden_size": options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.heads,
        "moe_intermediate_size": options.width,
        "shared_expert_intermediate_size": options.shared,
        "num_experts": options.experts,
        "num_experts_per_tok": options.top_k,
        "vocab_size": options.vocab,
        "max_position_embeddings": options.prompt + options.new,
    }


def make_models(options: argparse.Namespace) -> dict[str, Any]:
    """Every form by its name in the table."""
    fields, dtype = sizes(options), getattr(torch, options.dtype)

    def build(model: type, config: Any) -> Any:
        torch.manual_seed(options.seed)
        with torch.device(options.device):
            return model(config).to(dtype).eval()

    original = build(Qwen2MoeForCausalLM, Qwen2MoeConfig(**fields))
    weights, bases = original.state_dict(), None
    models = {"original": original}
    soft = {"merge": "soft", "segment": options.segment, "eta": 1.0}
    recipes = {
        "residual": {"merge": "residual"},
        "soft, token": {"merge": "soft"},
        "soft, all": soft | {"routing_span": "all"},
        "soft, previous": soft | {"routing_span": "previous"},
        **{f"soft, all, rank {rank}": soft | {"curvature": "calibrated", "rank": rank} for rank in (1, 4)},
        "soft, all, kronecker": soft | {"curvature": "kronecker"},
        "residual, cosine": {"merge": "residual", "routing": "cosine"},
        "residual, stable": {"merge": "residual", "routing": "stable"},
    }
    for name, recipe in recipes.items():
        model = build(NamexQwen2MoeForCausalLM, NamexQwen2MoeConfig(**fields, namex=recipe))
        if bases is None:
            bases = {key: t for key, t in model.state_dict().items() if ".base_expert." in key}
        more = {key: t for key, t in model.state_dict().items() if ".curvature." in key or "_router." in key}
        for key, table in more.items():
            if key.endswith(".assignment"):
                table.copy_(torch.rand(len(table), options.experts).topk(options.top_k).indices)
        model.load_state_dict(weights | bases | more, assign=True)
        models[name] = model
    fields |= {"num_experts": 1, "num_experts_per_tok": 1}
    models["grouped, 1 expert"] = build(Qwen2MoeForCausalLM, Qwen2MoeConfig(**fields))
    return models


def wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def clock(model: Any, tokens: torch.Tensor, new: int, device: str) -> Round:
    """One prompt and `new` greedy tokens after it."""
    cache = DynamicCache(config=model.config)
    continued = {Arguments.of(type(model).forward).cache: cache}
    wait(device)
    start = time.perf_counter()
    logits = model(tokens, logits_to_keep=1, **continued).logits
    wait(device)
    filled = time.perf_counter()
    for _ in range(new):
        logits = model(logits[:, -1:].argmax(-1), **continued).logits
    wait(device)
    done = time.perf_counter()
    kept = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    added = getattr(cache, "routing_bytes", 0)
    return Round(tokens.numel() / (filled - start), len(tokens) * new / (done - filled), kept, added)


def table_of(rounds: dict[str, list[Round]], batch: int) -> Table:
    columns = ["prefill tokens/s", "of original", "decode tokens/s", "of original", "MB a sequence", "of it added"]
    table = Table(["", *columns], [])
    medians = {
        name: [statistics.median(values) for values in zip(*results, strict=True)] for name, results in rounds.items()
    }
    first = medians["original"]
    for name, (prefill, decode, kept, added) in medians.items():
        speeds = [f"{prefill:,.0f}", f"{prefill / first[0]:.2f}", f"{decode:,.1f}", f"{decode / first[1]:.2f}"]
        sizes = [f"{size / batch / 1e6:,.2f}" for size in (kept + added, added)]
        table.rows.append([name, *speeds, *sizes])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole = {
        "layers": (1, "layers, each with all experts (1 GB in bfloat16 at true width)"),
        "hidden": (2048, "hidden size"),
        "width": (1408, "width of a routed expert"),
        "shared": (5632, "width of the shared expert"),
        "experts": (60, "routed experts"),
        "top-k": (4, "experts a token"),
        "heads": (16, "attention heads"),
        "vocab": (1024, "vocabulary"),
        "batch": (1, "sequences"),
        "prompt": (1024, "tokens of the prompt"),
        "new": (128, "tokens decoded after it"),
        "segment": (64, "tokens that share a merged expert"),
        "repeats": (3, "timed rounds, after one that is not counted"),
        "seed": (0, "of weights and tokens"),
    }
    for name, (default, text) in whole.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    console = Console()
    with console.status("making weights"):
        models = make_models(options)
    draw = torch.Generator().manual_seed(options.seed)
    tokens = torch.randint(options.vocab, (options.batch, options.prompt), generator=draw).to(options.device)
    rounds: dict[str, list[Round]] = {name: [] for name in models}
    for number in range(options.repeats + 1):
        for name, model in models.items():
            with console.status(f"round {number} of {options.repeats}: {name}"):
                result = clock(model, tokens, options.new, options.device)
            if number:
                rounds[name].append(result)
    place = torch.cuda.get_device_name() if torch.device(options.device).type == "cuda" else options.device
    title = (
        f"{options.layers} layer(s) of hidden {options.hidden}, {options.experts} experts of {options.width}, "
        f"{options.dtype}, batch {options.batch}, prompt {options.prompt}, {options.new} new, segment "
        f"{options.segment}; {place}, {torch.get_num_threads()} threads"
    )
    print("", title, "", *table_of(rounds, options.batch).markdown(numbers=True), sep="\n")


if __name__ == "__main__":
    main()
