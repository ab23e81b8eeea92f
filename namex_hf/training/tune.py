"""One run of supervised fine-tuning: from a checkpoint and chats to a patched folder, killed and continued at will."""

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
from ..families.kinds import kind_of
from ..files import REPORT, SCORES, found, read_checked, read_json, write_checked, write_text
from ..printable import marked
from ..recipe import Recipe
from ..report.report import Report, versions
from .bargain import Settled, rebargain
from .chats import Chats
from .choice import check_trains, table_of, train_only
from .finish import layer_records, save_trained
from .labels import Labelled, labelled, length_table
from .live import go_live
from .plan import Choice, Plan, planned, stated
from .scores import Items, measure, value
from .stable_moe import freeze
from .start import Start
from .trainer import LabelTokens, NamexTrainer, StageOneTrainer, last_checkpoint

LIBRARIES = ("accelerate", "trl", "peft", "datasets")


def tune(
    start: Start,
    chats: Chats,
    arguments: SFTConfig,
    choice: Choice,
    out: Path,
    console: Console,
    overwrite: bool = False,
) -> Report:
    """Train, and leave a folder that loads as every patched folder does.

    A run that was killed goes on from its last checkpoint when it is called again; a folder that is complete is left as
    it is. On several processes all of them call this; the first one writes.

    Args:
        arguments: of the trainer, which are left as they are; the output folder is `out`.

    Raises:
        NamexError: bad input, before training starts.
        OutputError: the folder is another run's, in use, or the disk is full.
    """
    run = {
        "recipe": start.recipe.to_dict(),
        "source": start.checkpoint.fingerprint(),
        "files": start.checkpoint.identity.record(),
        "data": {"name": chats.name, "sha256": chats.sha256, "chats": len(chats.train)},
        "training": choice.stated() | stated(arguments, choice.live),
    }
    folder = OutputFolder(out, run, start.checkpoint.identity, resumes=("checkpoint-*", "compare"))
    first = arguments.process_index == 0
    arguments = copy(arguments)
    arguments.output_dir = str(out)
    folder.check(overwrite)
    plan = planned(start, choice)
    if not overwrite and folder.complete:
        console.print(f"{marked(out)} is complete: this run was made before", soft_wrap=True)
        return Report.from_file(found(out, REPORT))
    ready = labelled(chats, start.tokenizer(), arguments)
    console.print(length_table(ready))
    arguments.assistant_only_loss = False  # the labels are there
    arguments.dataset_num_proc = None  # else every process packs a part of the chats, and sequences become others
    arguments.distributed_state.wait_for_everyone()  # all have looked at the folder before the first one claims it
    with folder.claimed(overwrite) if first else nullcontext():
        return Run(start, ready, arguments, choice, plan, folder, console).finish()


class Run:
    """What one run holds while it lasts: tokenizer, model and trainer."""

    def __init__(
        self,
        start: Start,
        chats: Labelled,
        arguments: SFTConfig,
        choice: Choice,
        plan: Plan,
        folder: OutputFolder,
        console: Console,
    ):
        self.start, self.arguments, self.choice, self.folder, self.console = start, arguments, choice, folder, console
        self.tokenizer = start.tokenizer()
        model = start.model(self.tokenizer, **choice.model_options)
        start.checkpoint.identity.settle()  # what was read just now is read again from memory
        if arguments.process_index == 0:
            start.checkpoint.identity.save_digests(folder.state)
        self.as_found = {name: getattr(model.config, name) for name in ("use_cache", "output_router_logits")}
        self.recipe = start.recipe
        if (text := getattr(model.config, "namex", None)) is not None:
            self.recipe = Recipe.from_dict(text)  # with the name of the text that it was calibrated on
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
                if kind_of(name) == "base":  # carried along; PEFT would train it
                    parameter.requires_grad_(False)
        if plan.live:
            go_live(getattr(self.trainer.model, "get_base_model", lambda: self.trainer.model)())
        self.trains = check_trains(self.trainer.model, plan.kinds)
        console.print(table_of(self.trains))
        if choice.bargain_every and not plan.bargain_every:
            console.print(f"no bargain in training: {self._why_no_bargain()}", soft_wrap=True)

    def _why_no_bargain(self) -> str:
        if not self.recipe.has_base:
            return "the model has no base expert"
        return f"method {self.recipe.method}" if not self.recipe.propagates else "neither experts nor base train"

    def finish(self) -> Report:
        """Score, train, score again, save."""
        before = self._scores("before")
        started = time.perf_counter()
        resume = self.arguments.resume_from_checkpoint or last_checkpoint(self.folder.path)
        if resume:
            self.console.print(f"going on from {marked(Path(str(resume)).name)}")
        self.trainer.train(resume_from_checkpoint=resume)
        best = self._best()
        self.trainer.model.eval()
        student = freeze(self.trainer.model) if self.choice.stage_one else None
        seconds, settling = time.perf_counter() - started, time.perf_counter()
        settled: list[Settled] = []
        if self.recipe.has_base:
            settled = rebargain(self.trainer.model, self.recipe, write=self.trainer.bargain is not None)
        settling = time.perf_counter() - settling
        report = Report(
            self.folder.run | {"files": self.start.checkpoint.identity.record()},
            self.start.source,
            self.trainer.model.config.model_type,
            layer_records(settled, settling),
            {"seconds": round(seconds, 1)},
            versions(*LIBRARIES),
            training=self._record(seconds, best) | ({} if student is None else {"assigned": int(student.seen.sum())}),
        )
        return self._saved(report, settled, before)

    def _scores(self, when: str) -> Items:
        """Of the model as it is, or as it was found when this run was there before."""
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
        """The configuration as the model came, without what the trainer has switched on or off in it."""
        now = {name: getattr(config, name) for name in self.as_found}
        vars(config).update(self.as_found)
        try:
            yield
        finally:
            vars(config).update(now)

    def _best(self) -> dict[str, Any] | None:
        """The checkpoint that the model is now, where the best one was to be loaded at the end."""
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
        """Of the training, for the report: of the checkpoint `best`, or of the last step."""
        steps = self.trainer.state.global_step
        at, tokens = (best["step"], best["tokens"]) if best else (steps, self.trainer.label_tokens.count)
        history = [entry for entry in self.trainer.state.log_history if "loss" in entry and entry["step"] <= at]
        bargain = self.trainer.bargain
        return {
            "steps": at,
            "tokens": tokens,
            **({"best_of": {"steps": steps, "metric": best["metric"], "value": best["value"]}} if best else {}),
            "trainable": {kind: some for kind, (some, _) in self.trains.items() if some},
            "parameters": {kind: every for kind, (_, every) in self.trains.items()},
            "loss": [{key: entry[key] for key in LOGGED if key in entry} for entry in history],
            "bargain_seconds": None if bargain is None else round(bargain.seconds, 3),
            "seconds": round(seconds, 3),
        }

    def _saved(self, report: Report, settled: list[Settled], before: Items) -> Report:
        trainer, state_dict = self.trainer, None
        model = trainer.accelerator.unwrap_model(trainer.model)
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            whole = trainer.deepspeed if trainer.is_deepspeed_enabled else trainer.model
            state_dict = trainer.accelerator.get_state_dict(whole)  # on every process
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
                save_trained(self.folder, model, self.tokenizer, carried, report, settled, state_dict)
        trainer.accelerator.wait_for_everyone()
        return report


BARGAIN = ("spread", "residual", "drift", "no_agreement", "uniform_fallback")
STAGE_ONE = ("balance", "distillation")
LOGGED = (
    *("step", "loss", "aux_loss"),
    *(f"stable/{name}" for name in STAGE_ONE),
    *(f"bargain/{name}" for name in BARGAIN),
)


def check_sharding(trainer: NamexTrainer, choice: Choice) -> None:
    """Raises:
    TrainingError: FSDP of version 1, or none although it was asked for; an adapter or a student on a sharded model.
    """
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not trainer.is_fsdp_enabled:
        raise TrainingError(
            "FSDP was asked for, and accelerate shards nothing on CPUs; accepted: accelerators, or none"
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
    """Item by item, before and after; empty where none were taken."""
    path = found(out, SCORES)
    return read_json(path) if path.is_file() else {}
