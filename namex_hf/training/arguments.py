"""What a run of fine-tuning takes from its command line: our options and all of TRL's, checked."""

from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from trl import SFTConfig, TrlParser

from ..errors import UsageError
from ..evaluation.statistics import MEASURES
from ..printable import did_you_mean
from ..resources import beside
from .choice import EVERYTHING, check_kinds
from .libraries import check_libraries

COMPARED = {"original": "smoe", "ep-camex": "ep-camex", "namex": "namex", "camex": "camex"}
"""What can stand beside the main run, with the method of its recipe."""
NONE = "none"
MODEL = ("--model_name_or_path", "--model-name-or-path", "--model")


@dataclass
class NamexArguments:
    """What is tuned, and how; the names that TRL has too mean the same."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "a folder of namex-patch, a stock checkpoint, a packaged model or a Hub id",
            "aliases": ["--model"],
        },
    )
    model_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a Hub id"})
    recipe: str | None = field(
        default=None,
        metadata={
            "help": "for a stock checkpoint, patched in memory: a YAML file, or a name of 'namex recipes' (default: "
            "NAMEx-Full)"
        },
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
            "help": f"train these too, at equal steps and seeds, below --out: {', '.join(COMPARED)}; or none. Their "
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

    output_dir: str | None = field(
        default=None, metadata={"help": "folder of the result (needed)", "aliases": ["--out"]}
    )
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
            raise UsageError("--out is needed: the folder of the result")
        if self.bf16 is None and not self.fp16:
            self.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        self.use_cpu |= not torch.accelerator.is_available()  # else processes on CPUs do not find each other
        self.dataloader_pin_memory &= not self.use_cpu
        super().__post_init__()


def read(arguments: Sequence[str], prog: str, description: str) -> tuple[NamexArguments, TrainingArguments]:
    """Parse and check a command line; without a model and a configuration it is that of ``configs/tiny.yaml``.

    Raises:
        UsageError: as of `check`.
    """
    words = list(arguments)
    if words and not words[0].startswith("-"):
        words.insert(0, "--model")
    if not {"--config", *MODEL} & {word.partition("=")[0] for word in words}:
        words += ["--config", str(beside("finetune") / "configs" / "tiny.yaml")]
    parser = TrlParser(
        [NamexArguments, TrainingArguments],  # type: ignore[list-item]
        description=description,
        formatter_class=RawDescriptionHelpFormatter,
        prog=prog,
    )
    asked, training, unknown = parser.parse_args_and_config(words, return_remaining_strings=True)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise UsageError(f"unrecognized arguments: {' '.join(unknown)}{did_you_mean(unknown[0], flags)}")
    check(asked, training)
    return asked, training


def check(asked: NamexArguments, training: TrainingArguments) -> None:
    """What can be said before anything is read.

    Raises:
        UsageError: naming the argument, what was found and what is accepted.
    """
    if asked.model_name_or_path is None:
        raise UsageError("--model is needed: a folder, a packaged model or a Hub id")
    if asked.bargain_every < 0 or asked.held_out < 2 or asked.lora_r < 1:
        raise UsageError("--bargain_every accepts numbers from 0, --lora_r from 1, --held_out from 2")
    if asked.propagation not in ("stored", "live"):
        raise UsageError(f"--propagation {asked.propagation}: accepted: stored, live")
    if asked.stable_stage is not None:
        check_stage_one(asked, training)
    check_kinds(asked.train_kinds, asked.use_peft)
    check_named("compare", asked.compare, COMPARED)
    check_named("scores", asked.scores or [], MEASURES)
    if asked.compare == [NONE]:
        asked.compare = []
    if training.push_to_hub:
        raise UsageError("--push_to_hub: the trainer would push its checkpoints; push the finished folder instead")
    if training.trust_remote_code:
        raise UsageError("--trust_remote_code: no code of others is run; accepted: the families of namex_hf")
    check_libraries(training)


def check_named(option: str, found: Sequence[str], known: Iterable[str]) -> None:
    """Raises:
    UsageError: neither known names nor `NONE` alone.
    """
    accepted = (*known, NONE)
    for one in found:
        if one not in accepted:
            raise UsageError(f"--{option} {one}: accepted: {', '.join(accepted)}")
    if NONE in found and len(found) > 1:
        raise UsageError(f"--{option} {' '.join(found)}: none stands alone")


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


def set_length(training: TrainingArguments, context: int | None) -> None:
    """Raises:
    TrainingError: sequences longer than the model can attend to.
    """
    if training.max_length is None:
        training.max_length = min(2048, context or 2048)
    elif context is not None and training.max_length > context:
        raise UsageError(f"--max_length {training.max_length}: this model attends to {context} tokens at most")
