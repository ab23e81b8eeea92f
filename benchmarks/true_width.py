"""Time and memory of a patch at true layer width: ``python benchmarks/true_width.py``.

Makes a Qwen2-MoE checkpoint of true width on the spot (4 layers, hidden 2048, 60 experts of 1408, bf16: 4.2 GB),
patches it, and prints ratios within this run:

* ``residual``, clocked inside the process after imports, against ``cp -r`` + ``sync`` of the checkpoint;
* ``grouped`` (30 of 60), likewise, against ``cat`` of the checkpoint into one file + ``sync``;
* peak resident memory above that of a process that only imports, in layers.

Every measurement starts from a cold cache (the files' pages are dropped first). Rounds alternate; medians are quoted.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from namex_hf.checkpoint.bytes import Reader
from namex_hf.checkpoint.shard import Item, write_shard

HIDDEN, WIDTH, SHARED = 2048, 1408, 5632
CHILD = """
import json, sys, time
import namex_hf
from namex_hf import Recipe, patch_checkpoint
if len(sys.argv) > 1:
    start = time.perf_counter()
    patch_checkpoint(sys.argv[1], sys.argv[2], Recipe(**json.loads(sys.argv[3])))
    print(time.perf_counter() - start)
"""


def make(folder: Path, layers: int, experts: int, shards: int, vocabulary: int = 1024) -> None:
    """A checkpoint of random weights in the Hub's layout."""
    folder.mkdir()
    config = {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_hidden_layers": layers,
        "hidden_size": HIDDEN,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "moe_intermediate_size": WIDTH,
        "shared_expert_intermediate_size": SHARED,
        "num_experts": experts,
        "num_experts_per_tok": 4,
        "vocab_size": vocabulary,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    draw = torch.Generator().manual_seed(0)

    def item(name: str, *shape: int) -> Item:
        return Item(name, torch.bfloat16, shape, lambda: (torch.randn(shape, generator=draw) * 0.02).bfloat16())

    items = [item("model.embed_tokens.weight", vocabulary, HIDDEN), item("lm_head.weight", vocabulary, HIDDEN)]
    items.append(item("model.norm.weight", HIDDEN))
    for layer in range(layers):
        block = f"model.layers.{layer}"
        items += [item(f"{block}.{norm}.weight", HIDDEN) for norm in ("input_layernorm", "post_attention_layernorm")]
        for name in "qkvo":
            items.append(item(f"{block}.self_attn.{name}_proj.weight", HIDDEN, HIDDEN))
        items += [item(f"{block}.self_attn.{name}_proj.bias", HIDDEN) for name in "qkv"]
        items.append(item(f"{block}.mlp.gate.weight", experts, HIDDEN))
        items.append(item(f"{block}.mlp.shared_expert_gate.weight", 1, HIDDEN))
        for place, width in (("shared_expert", SHARED), *((f"experts.{e}", WIDTH) for e in range(experts))):
            items.append(item(f"{block}.mlp.{place}.gate_proj.weight", width, HIDDEN))
            items.append(item(f"{block}.mlp.{place}.up_proj.weight", width, HIDDEN))
            items.append(item(f"{block}.mlp.{place}.down_proj.weight", HIDDEN, width))
    weight_map: dict[str, str] = {}
    size = len(items) // shards + 1
    for number in range(shards):
        part, name = items[number * size : (number + 1) * size], f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        with Reader() as reader:
            write_shard(folder / name, part, reader)
        weight_map |= {one.name: name for one in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def shell(command: str, source: Path) -> float:
    forget(source)
    start = time.perf_counter()
    subprocess.run(command, shell=True, check=True)
    return time.perf_counter() - start


def child(*arguments: str) -> tuple[float, int]:
    """Seconds that the child clocked itself, and its peak resident memory in bytes."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stdout=output)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"the run failed with status {status}")
        output.seek(0)
        return float(output.read() or 0), usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=60)
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder), on a real disk")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
        source, out = Path(work) / "source", Path(work) / "out"
        make(source, arguments.layers, arguments.experts, arguments.shards)
        layer = 3 * arguments.experts * HIDDEN * WIDTH * 2
        size = sum(path.stat().st_size for path in source.iterdir())
        print(f"{size / 1e9:.2f} GB, a layer's experts {layer / 1e9:.2f} GB")
        imports = child()[1]
        runs = {
            "residual": (f"cp -r {source} {out} && sync", {}),
            "grouped": (
                f"cat {source}/*.safetensors > {out} && sync",
                {"merge": "grouped", "experts": arguments.experts // 2},
            ),
        }
        for merge, (command, recipe) in runs.items():
            plain, ours, peaks = [], [], []
            for _ in range(arguments.rounds):
                plain.append(shell(command, source))
                shutil.rmtree(out, ignore_errors=True)
                out.unlink(missing_ok=True)
                forget(source)
                seconds, peak = child(str(source), str(out), json.dumps(recipe))
                ours.append(seconds)
                peaks.append((peak - imports) / layer)
                shutil.rmtree(out)
            ratios = [a / b for a, b in zip(ours, plain, strict=True)]
            what = command.split()[0]
            print(
                f"{merge}: {statistics.median(ours):.1f} s, {what} + sync {statistics.median(plain):.1f} s, ratio "
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); peak memory above imports "
                f"{max(peaks):.2f} layers"
            )


if __name__ == "__main__":
    main()
