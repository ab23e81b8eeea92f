"""Fine-tune a merged Mixture-of-Experts model on chats, with TRL.

With nothing but --output_dir it works offline: configs/tiny.yaml, that is the packaged model `tiny` on the packaged
chats, NAMEx-Full beside the original and EP-CAMEx at equal steps and seeds. A run that was killed is continued by the
same command.

    python finetune/sft_smoltalk.py --output_dir out/tuned
    python finetune/sft_smoltalk.py --model_name_or_path out/patched --output_dir out/sft \\
        --dataset_name HuggingFaceTB/smoltalk --dataset_config all --use_peft --train_kinds experts router base

docs/training.md has the commands for sharded training, what trains and what it costs. Every option of TRL's SFTConfig
is there too, below ours.
"""

import sys
import warnings
from argparse import RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path

import namex_hf.commands.common  # noqa: F401  (the first: Ctrl-C is answered while the others are imported)

# isort: split
from rich.console import Console

from namex_hf.checkpoint.layout import left_out_line
from namex_hf.commands.common import ended
from namex_hf.errors import MissingExtraError, UsageError
from namex_hf.printable import marked
from namex_hf.recipe import Recipe

try:
    import torch
    from transformers.utils import logging
    from trl import SFTConfig, TrlParser

    from namex_hf.evaluation.statistics import MEASURES, difference, value
    from namex_hf.evaluation.table import Table
    from namex_hf.training.chats import check_template, load_chats
    from namex_hf.training.choice import EVERYTHING, check_kinds
    from namex_hf.training.libraries import check_libraries
    from namex_hf.training.plan import Adapter, Choice, measures_for
    from namex_hf.training.rivals import left_out, rival
    from namex_hf.training.scores import verdict
    from namex_hf.training.start import dtype_of, start_from
    from namex_hf.training.tune import scores_of, tune
except ImportError as missing:
    print(f"sft_smoltalk.py: error: {MissingExtraError('fine-tuning', 'train')} ({missing})", file=sys.stderr)
    sys.exit(2)

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "tiny.yaml"
SCORED_BYTES = 256 << 20
"""A checkpoint up to this size is scored on text and word problems too, unless told otherwise."""
COMPARED = {"original": "smoe", "ep-camex": "ep-camex", "namex": "namex", "camex": "camex"}
"""What can stand beside the main run, with the method of its recipe."""


@dataclass
class NamexArguments:
    """What is tuned, and how; the names that TRL has too mean the same."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "a folder of namex-patch, a stock checkpoint, a packaged model or a Hub id"}
    )
    model_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a Hub id"})
    recipe: str | None = field(
        default=None, metadata={"help": "YAML recipe for a stock checkpoint, patched in memory (default: NAMEx-Full)"}
    )
    dtype: str = field(default="float32", metadata={"help": "auto, bfloat16, float16 or float32, of the weights"})
    attn_implementation: str | None = field(default=None, metadata={"help": "of transformers, such as sdpa"})
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "a .jsonl or .parquet file of `messages`, or a Hub data set (default: the packaged chats)"},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "of a Hub data set; SmolTalk has 'all'"})
    dataset_train_split: str = field(default="train", metadata={"help": "of a Hub data set, to train on"})
    dataset_test_split: str = field(default="test", metadata={"help": "of a Hub data set, to score on"})
    held_out: int = field(default=200, metadata={"help": "chats to score on, at most; at least 2"})
    train_kinds: list[str] = field(
        default_factory=lambda: [EVERYTHING],
        metadata={
            "help": "everything, or some of experts, base, router, curvature, shared, dense, attention, "
            "embeddings, norms; with --use_peft low-rank adapters on them"
        },
    )
    bargain_every: int = field(
        default=10,
        metadata={"help": "solve the games and propagate the base expert again every n optimiser steps; 0: never"},
    )
    propagation: str = field(
        default="stored",
        metadata={
            "help": "stored: every layer's base expert trains, and a bargain writes it anew; live: it walks through "
            "the layers in every pass, and the first one trains"
        },
    )
    stable_stage: int | None = field(
        default=None,
        metadata={
            "help": "1: StableMoE's first stage, for a model with routing: stable. It routes linearly while a student "
            "learns from token ids which experts the router chooses; at the end they are assigned to each id. Without "
            "it the assignment stays as it is, which is the second stage"
        },
    )
    use_peft: bool = field(default=False, metadata={"help": "LoRA in the place of the parameters themselves"})
    lora_r: int = field(default=16, metadata={"help": "rank of the adapter"})
    lora_alpha: int = field(default=32, metadata={"help": "its factor, over the rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "of the adapter; 0 with experts or router"})
    compare: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"train these too, at equal steps and seeds, below --output_dir: {', '.join(COMPARED)}; their "
            "recipe is the trained one, with its routing and temperature, without fields that their method lacks"
        },
    )
    scores: list[str] | None = field(
        default=None,
        metadata={
            "help": f"measured before and after: {', '.join(MEASURES)}, or none (default: all for a small model, "
            "chats for a large one)"
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "make the folder anew, whichever run it is of"})


@dataclass
class TrainingArguments(SFTConfig):
    """TRL's, with other defaults: the assistant's turns alone count, and chats are packed."""

    output_dir: str | None = field(default=None, metadata={"help": "folder of the result (needed)"})
    learning_rate: float = field(default=2e-5, metadata={"help": "of AdamW, at its height"})
    assistant_only_loss: bool = field(default=True, metadata={"help": "the loss of the assistant's turns alone"})
    packing: bool = field(default=True, metadata={"help": "several chats a sequence, each attending to itself alone"})
    eval_packing: bool | None = field(default=False, metadata={"help": "the same for the chats that are scored"})
    max_length: int | None = field(
        default=None, metadata={"help": "tokens of a sequence (default: 2048, or the model's context if it is shorter)"}
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036  (the parser reads the first two)
        default="none", metadata={"help": "trackers, such as tensorboard"}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints kept"})

    def __post_init__(self) -> None:
        if self.output_dir is None:  # transformers would take a folder of its own choice
            raise UsageError("--output_dir is needed: the folder of the result")
        if self.bf16 is None and not self.fp16:
            self.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        self.use_cpu |= not torch.accelerator.is_available()  # else processes on CPUs do not find each other
        self.dataloader_pin_memory &= not self.use_cpu
        super().__post_init__()


def main(arguments: list[str]) -> None:
    """Read the arguments, check them, train what is asked for, and compare."""
    if "--config" not in arguments and "--model_name_or_path" not in arguments:
        arguments = [*arguments, "--config", str(DEFAULT_CONFIG)]
    parser = TrlParser(
        [NamexArguments, TrainingArguments],  # type: ignore[list-item]
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        prog="sft_smoltalk.py",
    )
    asked, training = parser.parse_args_and_config(arguments)
    check(asked, training)
    console = Console(stderr=True, quiet=training.process_index != 0)
    recipe = Recipe.from_yaml(asked.recipe) if asked.recipe else None
    start = start_from(asked.model_name_or_path, asked.model_revision, recipe)
    if line := left_out_line(start.left_out):
        console.print(line, soft_wrap=True, markup=False)
    if asked.compare and start.patched:
        raise UsageError(f"--compare begins with a stock checkpoint; {start.checkpoint.name} is patched already")
    method = start.recipe.merge.method
    if method in [COMPARED[name] for name in asked.compare]:
        raise UsageError(f"--compare {' '.join(asked.compare)}: the recipe's method is {method} itself")
    set_length(training, start.context)
    if training.chat_template_path is None:
        check_template(start.tokenizer(), start.checkpoint.name)
    splits = asked.dataset_train_split, asked.dataset_test_split
    chats = load_chats(
        asked.dataset_name, asked.dataset_config, splits, asked.held_out, training.data_seed or training.seed
    )
    adapter = Adapter(asked.lora_r, asked.lora_alpha, asked.lora_dropout) if asked.use_peft else None
    options = {"dtype": dtype_of(asked.dtype), **(training.model_init_kwargs or {})}
    if asked.attn_implementation:
        options["attn_implementation"] = asked.attn_implementation
    measures = measures_for(start.checkpoint.size, asked.scores, SCORED_BYTES)
    live = asked.propagation == "live"
    stage_one = asked.stable_stage == 1
    choice = Choice(tuple(asked.train_kinds), adapter, asked.bargain_every, measures, options, live, stage_one)

    out = Path(training.output_dir)
    runs = {str(method): (start, out)}
    for name in asked.compare:
        other = rival(start.recipe, COMPARED[name])
        runs[name] = start_from(asked.model_name_or_path, asked.model_revision, other), out / "compare" / name
        console.print(rival_line(name, start.recipe, other), soft_wrap=True, markup=False)
    for name, (one, folder) in runs.items():
        console.rule(marked(f"{name}: {folder}"))
        tune(one, chats, training, choice, folder, console, asked.overwrite)
    if training.process_index == 0:
        tell(Console(), {name: folder for name, (_, folder) in runs.items()}, measures)


def check(asked: NamexArguments, training: TrainingArguments) -> None:
    """What can be said before anything is read.

    Raises:
        UsageError: naming the argument, what was found and what is accepted.
    """
    if asked.model_name_or_path is None:
        raise UsageError("--model_name_or_path is needed: a folder, a packaged model or a Hub id")
    if asked.bargain_every < 0 or asked.held_out < 2 or asked.lora_r < 1:
        raise UsageError("--bargain_every accepts numbers from 0, --lora_r from 1, --held_out from 2")
    if asked.propagation not in ("stored", "live"):
        raise UsageError(f"--propagation {asked.propagation}: accepted: stored, live")
    if asked.stable_stage is not None:
        check_stage_one(asked, training)
    check_kinds(asked.train_kinds, asked.use_peft)
    for name, found, accepted in (
        ("compare", asked.compare, COMPARED),
        ("scores", asked.scores or [], {**MEASURES, "none": ""}),
    ):
        for one in found:
            if one not in accepted:
                raise UsageError(f"--{name} {one}: accepted: {', '.join(accepted)}")
    if training.push_to_hub:
        raise UsageError("--push_to_hub: the trainer would push its checkpoints; push the finished folder instead")
    if training.trust_remote_code:
        raise UsageError("--trust_remote_code: no code of others is run; accepted: the families of namex_hf")
    check_libraries(training)


def check_stage_one(asked: NamexArguments, training: TrainingArguments) -> None:
    """Raises:
    UsageError: another stage than the first, or what that goes without.
    """
    if asked.stable_stage != 1:
        raise UsageError(f"--stable_stage {asked.stable_stage}: accepted: 1; the second stage goes without it")
    for name, found, why in (
        ("use_peft", asked.use_peft, "an adapter's checkpoints do not hold the student"),
        ("propagation", asked.propagation == "live", "accepted: stored"),
        ("label_smoothing_factor", training.label_smoothing_factor, "the loss is the model's own"),
        ("loss_type", training.loss_type != "nll", "the loss is the model's own; accepted: nll"),
        ("router_aux_loss_coef", training.router_aux_loss_coef, "StableMoE has a balance loss of its own; accepted: 0"),
    ):
        if found:
            raise UsageError(f"--{name} does not go with --stable_stage 1: {why}")


def rival_line(name: str, recipe: Recipe, other: Recipe) -> str:
    """What a rival's recipe has in common with the trained one, and what it lacks."""
    merge, routing = other.merge, other.routing
    sharp = f", temperature {routing.temperature}" if routing.temperature else ""
    gone = ", ".join(f"{field}: {value}" for field, value in left_out(recipe, other).items())
    without = f"; without {gone}, which it does not have" if gone else ""
    return f"{name}: method {merge.method}, merge {merge.kind}, routing {routing.kind}{sharp}{without}"


def set_length(training: TrainingArguments, context: int | None) -> None:
    """Raises:
    TrainingError: sequences longer than the model can attend to.
    """
    if training.max_length is None:
        training.max_length = min(2048, context or 2048)
    elif context is not None and training.max_length > context:
        raise UsageError(f"--max_length {training.max_length}: this model attends to {context} tokens at most")


def tell(console: Console, folders: dict[str, Path], measures: tuple[str, ...]) -> None:
    """Scores before and after, and a sentence on every comparison."""
    items = {name: scores_of(folder) for name, folder in folders.items()}
    if not all(items.values()):
        return
    table = Table(["", *("problems, %" if name == "problems" else f"{name}, perplexity" for name in measures)], [])
    for name, found in items.items():
        cells = [" -> ".join(f"{value(m, found[when][m]):.2f}" for when in ("before", "after")) for m in measures]
        table.rows.append([name, *cells])
    console.print(table.screen("before -> after"))
    for name in measures:
        console.print(f"{name}: {MEASURES[name]}", soft_wrap=True)
    main_run, *rivals = items
    for rival in rivals:
        after, other = items[main_run]["after"], items[rival]["after"]
        apart = {name: difference(name, after[name], other[name]) for name in measures}
        console.print(verdict(main_run, rival, apart), soft_wrap=True)
    console.print(f"the model: {marked(folders[main_run])}", soft_wrap=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|trl")
    logging.set_verbosity_error()
    stopped = "stopped; the same command goes on from the last checkpoint"
    answered = (ValueError, ImportError)  # by transformers and TRL, of arguments and of libraries that these need
    sys.exit(ended("sft_smoltalk.py", lambda: main(sys.argv[1:]), stopped, answered))
