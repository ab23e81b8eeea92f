"""A resumable run of supervised fine-tuning, from a checkpoint and chats to a patched folder."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from pathlib import Path
from typing import Any

from rich.console import Console
from trl import SFTConfig

from ..checkpoint.folder import OutputFolder
from ..errors import TrainingError
from ..evaluation.statistics import value
from ..families.kinds import kind_of
from ..files import REPORT, SCORES, locate, read_checked, read_json, write_checked, write_text
from ..printable import marked
from ..recipe import Recipe
from ..record import Report, versions
from .bargain import LayerBargain, rebargain
from .chats import Chats
from .choice import check_trains, table_of, train_only
from .finish import layer_records, save_trained
from .labels import Labelled, labelled, length_table
from .live import go_live
from .plan import Choice, changed_arguments, plan_training
from .scores import Items, measure
from .stable_moe import freeze
from .start import Start
from .trainer import LabelTokens, NamexTrainer, StageOneTrainer, last_checkpoint

LIBRARIES = ("accelerate", "trl", "peft", "datasets")
LOGGED = (
    *("step", "loss", "aux_loss", "stable/balance", "stable/distillation"),
    *("bargain/spread", "bargain/residual", "bargain/drift", "bargain/no_agreement", "bargain/uniform_fallback"),
)
"""Numbers of the trainer's log that the report has."""


def tune(
    start: Start,
    chats: Chats,
    arguments: SFTConfig,
    choice: Choice,
    out: Path,
    console: Console,
    overwrite: bool = False,
) -> Report:
    """Train, and write a patched folder.

    After a kill, the same call resumes from the last checkpoint; a complete folder is not changed. With several
    processes all call this, and the first writes.

    Args:
        arguments: arguments of the trainer, which are not changed; the output folder is `out`.

    Raises:
        NamexError: bad input, before training starts.
        OutputError: the folder belongs to another run or is in use, or the disk is full.
    """
    run = {
        "recipe": start.recipe.to_dict(),
        "source": start.checkpoint.fingerprint(),
        "files": start.checkpoint.identity.record(),
        "data": {"name": chats.name, "sha256": chats.sha256, "chats": len(chats.train)},
        "training": choice.record() | changed_arguments(arguments, choice.live),
    }
    folder = OutputFolder(out, run, start.checkpoint.identity, resumes=("checkpoint-*", "compare"))
    first = arguments.process_index == 0
    arguments = copy(arguments)
    arguments.output_dir = str(out)
    folder.check(overwrite)
    plan = plan_training(start, choice)
    if not overwrite and folder.complete:
        console.print(f"{marked(out)} is complete: this run was made before", soft_wrap=True)
        return Report.from_file(locate(out, REPORT))
    ready = labelled(chats, start.tokenizer(), arguments)
    console.print(length_table(ready))
    arguments.assistant_only_loss = False  # the rows have labels already
    arguments.dataset_num_proc = None  # else every process packs a part of the chats, which changes the sequences
    arguments.distributed_state.wait_for_everyone()  # all check the folder before the first process locks it
    with folder.claimed(overwrite) if first else nullcontext():
        return Run(start, ready, arguments, choice, plan, folder, console).finish()


class Run:
    """A run with its tokenizer, model and trainer."""

    def __init__(
        self,
        start: Start,
        chats: Labelled,
        arguments: SFTConfig,
        choice: Choice,
        plan: Choice,
        folder: OutputFolder,
        console: Console,
    ):
        self.start, self.arguments, self.choice, self.folder, self.console = start, arguments, choice, folder, console
        self.tokenizer = start.tokenizer()
        model = start.model(self.tokenizer, **choice.model_options)
        start.checkpoint.identity.settle()  # the files are still in the page cache
        if arguments.process_index == 0:
            start.checkpoint.identity.save_digests(folder.state)
        self.original_settings = {name: getattr(model.config, name) for name in ("use_cache", "output_router_logits")}
        self.recipe = start.recipe
        if (text := getattr(model.config, "namex", None)) is not None:
            self.recipe = Recipe.from_stored(text)  # it names its calibration text
        if plan.adapter is None:
            train_only(model, plan.kinds)
        kind = StageOneTrainer if choice.stage_one else NamexTrainer
        self.trainer = kind(
            model=model,
            args=arguments,
            train_dataset=chats.train,
            eval_dataset=chats.held_out,
            processing_class=self.tokenizer,
            peft_config=plan.adapter,
            recipe=self.recipe,
            bargain_every=plan.bargain_every,
            source=start.checkpoint.folder,
        )
        check_sharding(self.trainer, choice)
        if plan.adapter is not None and "base" not in plan.kinds:
            for name, parameter in self.trainer.model.named_parameters():
                if kind_of(name) == "base":  # only saved with the adapter; PEFT would train it
                    parameter.requires_grad_(False)
        if plan.live:
            go_live(getattr(self.trainer.model, "get_base_model", lambda: self.trainer.model)())
        self.trains = check_trains(self.trainer.model, plan.kinds)
        console.print(table_of(self.trains))
        if choice.bargain_every and not plan.bargain_every:
            console.print(f"no bargain in training: {self._why_no_bargain()}", soft_wrap=True)

    def _why_no_bargain(self) -> str:
        if not self.recipe.merge.has_base:
            return "the model has no base expert"
        merge = self.recipe.merge
        return f"method {merge.method}" if not merge.propagates else "neither experts nor base train"

    def finish(self) -> Report:
        """Score, train, score again and save."""
        before = self._scores("before")
        started = time.perf_counter()
        resume = self.arguments.resume_from_checkpoint or last_checkpoint(self.folder.path)
        if resume:
            self.console.print(f"going on from {marked(Path(str(resume)).name)}")
        self.trainer.train(resume_from_checkpoint=resume)
        best = self._best()
        self.trainer.model.eval()
        student = freeze(self.trainer.model) if self.choice.stage_one else None
        seconds, bargain_start = time.perf_counter() - started, time.perf_counter()
        bargains: list[LayerBargain] = []
        if self.recipe.merge.has_base:
            bargains = rebargain(self.trainer.model, self.recipe, write=self.trainer.bargain is not None)
        bargain_seconds = time.perf_counter() - bargain_start
        report = Report(
            self.folder.run | {"files": self.start.checkpoint.identity.record()},
            self.start.source,
            self.trainer.model.config.model_type,
            layer_records(bargains, bargain_seconds),
            {"seconds": round(seconds, 1)},
            versions(*LIBRARIES),
            training=self._record(seconds, best) | ({} if student is None else {"assigned": int(student.seen.sum())}),
        )
        return self._saved(report, bargains, before)

    def _scores(self, when: str) -> Items:
        """Scores of the current model, or those from an earlier start of this run."""
        path = self.folder.state / f"{when}.json"
        if self.arguments.world_size > 1 or not self.choice.measures:
            return {}
        if when == "before" and isinstance(items := read_checked(path), dict):
            return items
        model = self.trainer.model
        with self.console.status(f"scores {when} training"), self._untouched(model.config):
            items = measure(model, self.tokenizer, self.trainer.eval_dataset, self.choice.measures)
        write_checked(path, items)
        return items

    @contextmanager
    def _untouched(self, config: Any) -> Iterator[None]:
        """Inside this context the configuration has its original settings, without the trainer's changes."""
        changed = {name: getattr(config, name) for name in self.original_settings}
        vars(config).update(self.original_settings)
        try:
            yield
        finally:
            vars(config).update(changed)

    def _best(self) -> dict[str, Any] | None:
        """The checkpoint that the trainer loaded at the end, under `load_best_model_at_end`."""
        state, arguments = self.trainer.state, self.arguments
        if not arguments.load_best_model_at_end:
            return None
        if state.best_model_checkpoint is None:
            raise TrainingError("--load_best_model_at_end: no checkpoint was scored, or the best one is gone")
        metric = arguments.metric_for_best_model
        self.console.print(f"the best of {state.global_step} steps by {metric}: step {state.best_global_step}")
        tokens = LabelTokens.at(Path(state.best_model_checkpoint))
        return {"step": state.best_global_step, "tokens": tokens, "metric": metric, "value": state.best_metric}

    def _record(self, seconds: float, best: dict[str, Any] | None) -> dict[str, Any]:
        """The entry ``training`` of the report, up to the checkpoint `best` or the last step."""
        steps = self.trainer.state.global_step
        end, tokens = (best["step"], best["tokens"]) if best else (steps, self.trainer.label_tokens.count)
        history = [entry for entry in self.trainer.state.log_history if "loss" in entry and entry["step"] <= end]
        bargain = self.trainer.bargain
        return {
            "steps": end,
            "tokens": tokens,
            **({"best_of": {"steps": steps, "metric": best["metric"], "value": best["value"]}} if best else {}),
            "trainable": {kind: trainable for kind, (trainable, _) in self.trains.items() if trainable},
            "parameters": {kind: every for kind, (_, every) in self.trains.items()},
            "loss": [{key: entry[key] for key in LOGGED if key in entry} for entry in history],
            "bargain_seconds": None if bargain is None else round(bargain.seconds, 3),
            "seconds": round(seconds, 3),
        }

    def _saved(self, report: Report, bargains: list[LayerBargain], before: Items) -> Report:
        trainer, state_dict = self.trainer, None
        model = trainer.accelerator.unwrap_model(trainer.model)
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            wrapped = trainer.deepspeed if trainer.is_deepspeed_enabled else trainer.model
            state_dict = trainer.accelerator.get_state_dict(wrapped)  # on every process
        after = self._scores("after")
        if after:
            scores = {"before": before, "after": after}
            report.training["scores"] = {  # type: ignore[index]
                when: {name: value(name, groups) for name, groups in items.items()} for when, items in scores.items()
            }
        if self.arguments.process_index == 0:
            if self.choice.adapter is not None:
                model.save_pretrained(self.folder.path / "adapter")
                model = model.merge_and_unload()
            if after:
                write_text(self.folder.path / SCORES, json.dumps(scores))
            with self._untouched(model.config):
                carried = self.start.checkpoint.folder
                save_trained(self.folder, model, self.tokenizer, carried, report, bargains, state_dict)
        trainer.accelerator.wait_for_everyone()
        return report


def check_sharding(trainer: NamexTrainer, choice: Choice) -> None:
    """Raises:
    TrainingError: FSDP has version 1, or is not active on request; or a sharded model has an adapter or a student.
    """
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not trainer.is_fsdp_enabled:
        raise TrainingError(
            "FSDP is requested, and accelerate shards nothing on CPUs; accepted: accelerators, or no FSDP"
        )
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise TrainingError(
            "found FSDP of version 1, whose flat parameters hide the experts; accepted: fsdp_version: 2"
        )
    if choice.adapter is not None and sharded:
        raise TrainingError("an adapter on a sharded model is not merged here; accepted: one device, or data parallel")
    if choice.stage_one and sharded:
        raise TrainingError("StableMoE's first stage was not tried on shards; accepted: one device, or data parallel")


def scores_of(out: Path) -> dict[str, Items]:
    """Scores item by item, before and after training; empty without scores."""
    path = locate(out, SCORES)
    return read_json(path) if path.is_file() else {}
