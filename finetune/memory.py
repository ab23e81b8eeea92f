"""What fine-tuning takes of a device's memory, from a model's configuration alone: no tensor is read, nothing trained.

python finetune/memory.py                               # both published shapes, every strategy
python finetune/memory.py Qwen/Qwen1.5-MoE-A2.7B --strategy fsdp2 --devices 8 --tokens 8192 --length 4096
python finetune/memory.py deepseek-moe-16b --strategy lora --kinds experts router --rank 16
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from namex_hf.commands.common import Parser, ended
from namex_hf.errors import CheckpointError, MissingExtraError

try:
    from device_memory import (
        MARGIN,
        PRECISIONS,
        PROPAGATIONS,
        PUBLISHED,
        SHARDED,
        STRATEGIES,
        Plan,
        counts_table,
        memory,
        memory_table,
        outline,
    )

    from namex_hf.checkpoint.resolve import local_folder, peek
    from namex_hf.files import read_json
    from namex_hf.recipe import Recipe
    from namex_hf.resources import packaged_models
except ImportError as missing:
    print(f"memory.py: error: {MissingExtraError('fine-tuning', 'train')} ({missing})", file=sys.stderr)
    sys.exit(2)


def parser() -> Parser:
    """The command line."""
    made = Parser(prog="memory.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join((*PUBLISHED, *packaged_models()))
    made.add_argument("models", nargs="*", metavar="MODEL", help=f"a folder, a Hub id, or one of {names}")
    made.add_argument("--recipe", type=Path, metavar="FILE", help="of a stock model (default: NAMEx-Full, residual)")
    made.add_argument("--strategy", help=f"one of {', '.join(STRATEGIES)} (default: each of them)")
    made.add_argument("--devices", type=int, help=f"of {' and '.join(SHARDED)} (default: {Plan.devices})")
    made.add_argument("--length", type=int, default=Plan.length, help="tokens of a sequence (default: %(default)s)")
    made.add_argument("--tokens", type=int, help="in a device's forward pass (default: two sequences)")
    made.add_argument("--no-checkpointing", action="store_true", help="keep all activations for the backward pass")
    made.add_argument("--precision", help=f"one of {', '.join(PRECISIONS)} (default: what is usual)")
    made.add_argument("--kinds", nargs="+", default=list(Plan.kinds), help="under lora, adapted (default: %(default)s)")
    made.add_argument("--propagation", default="stored", help=f"of the base: {' or '.join(PROPAGATIONS)}")
    made.add_argument("--rank", type=int, default=Plan.rank, help="of lora (default: %(default)s)")
    return made


def config_of(model: str) -> Mapping[str, Any]:
    """The raw configuration of what a user names; of a Hub id no tensors are fetched.

    Raises:
        CheckpointError: there is no such thing.
    """
    if model in PUBLISHED:
        return PUBLISHED[model].to_dict()
    try:
        folder = local_folder(model)
    except CheckpointError as error:
        raise CheckpointError(f"{error}, or a shape by name ({', '.join(PUBLISHED)})") from error
    return peek(model).config if folder is None else read_json(folder / "config.json")


def plans(options: argparse.Namespace) -> list[Plan]:
    """What to calculate: the strategy that was asked for, or each.

    Raises:
        TrainingError: a choice that means nothing.
    """
    found = []
    for strategy in [options.strategy] if options.strategy else STRATEGIES:
        devices = options.devices
        if devices is None or (options.strategy is None and strategy not in SHARDED):
            devices = Plan.devices if strategy in SHARDED else 1
        found.append(
            Plan(
                strategy=strategy,
                devices=devices,
                tokens=2 * options.length if options.tokens is None else options.tokens,
                length=options.length,
                checkpointing=not options.no_checkpointing,
                precision=options.precision,
                kinds=tuple(options.kinds),
                rank=options.rank,
                propagation=options.propagation,
            )
        )
    return found


def show(options: argparse.Namespace) -> None:
    """Calculate and print."""
    chosen = plans(options)
    recipe = Recipe.from_yaml(options.recipe) if options.recipe else None
    models = {name: outline(config_of(name), recipe) for name in options.models or PUBLISHED}
    tables = [counts_table(models).screen("parameters")]
    for name, model in models.items():
        by_strategy = memory_table((plan, memory(model, plan)) for plan in chosen)
        tables.append(by_strategy.screen(f"{name}: GB a device"))
    console, plan = Console(), chosen[0]
    for table in tables:
        console.print(table)
    again = "computed again in the backward pass" if plan.checkpointing else "kept"
    console.print(
        f"{plan.tokens:,} tokens in a device's forward pass, in sequences of {plan.length:,}; activations are {again}. "
        "Exact: weights, gradients, optimiser (on the device that holds most). Estimates: layers gathered whole, "
        f"activations, logits. 'fits': GB of the devices on which {MARGIN:.0%} stays free for what is not counted.",
        soft_wrap=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 2 where something is to be mended, said in one line."""
    options = parser().parse_args(arguments)
    return ended("memory.py", lambda: show(options), "stopped")


if __name__ == "__main__":
    sys.exit(main())
