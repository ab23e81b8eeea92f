"""TRL's `SFTTrainer` for patched models: checkpoints that hold the experts, the bargain between steps, and counts."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from trl import SFTTrainer

from ..errors import TrainingError
from ..files import hash_file, read_checked, read_json, write_checked
from ..recipe import Recipe
from ..scoring.labelled import IGNORED
from .bargain import BargainCallback
from .generation import carried_settings
from .stable_moe import StageOne

STATE, SEAL = "trainer_state.json", "namex_seal.json"
"""In a checkpoint: its last file but one, and sizes and hashes of all its files, written after them."""


@contextmanager
def fused(model: Any) -> Iterator[None]:
    """While it lasts `model` is saved under the names that it has in memory."""
    model = getattr(model, "get_base_model", lambda: model)()
    had, before = "_weight_conversions" in vars(model), getattr(model, "_weight_conversions", None)
    model._weight_conversions = []
    try:
        yield
    finally:
        if had:
            model._weight_conversions = before
        else:
            del model._weight_conversions


class LabelTokens(TrainerCallback, ExportableState):
    """How many tokens have counted in the loss so far; checkpoints hold it, and a resumed run goes on from theirs."""

    def __init__(self) -> None:
        self.count = 0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"count": self.count}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Once a checkpoint has been read, where there is one."""
        stored = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.count = stored["attributes"]["count"] if state.global_step else 0

    @classmethod
    def at(cls, checkpoint: Path) -> int:
        """The count that a checkpoint holds."""
        states = read_json(checkpoint / STATE, TrainingError)["stateful_callbacks"]
        return int(states[cls.__name__]["attributes"]["count"])


class NamexTrainer(SFTTrainer):
    """`SFTTrainer` for models whose experts are fused in memory.

    transformers saves experts one by one, and its `Trainer` loads a checkpoint without joining them again: it warns,
    and goes on with the experts that it began with. Here a checkpoint holds them as they are in memory, and one that
    lacks a parameter is refused. (`from_pretrained` reads both layouts.)

    Args:
        recipe: of the model; None: no bargain.
        bargain_every: optimiser steps from one bargain to the next; 0: none.
        source: folder of the checkpoint that training begins with, whose generation settings go along.
    """

    def __init__(
        self,
        *args: Any,
        recipe: Recipe | None = None,
        bargain_every: int = 0,
        source: Path | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.source, self.label_tokens = source, LabelTokens()
        self.add_callback(self.label_tokens)
        self.bargain = None
        if recipe is not None and bargain_every:
            self.bargain = BargainCallback(recipe, bargain_every)
            self.add_callback(self.bargain)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's, and a count of the labels on all processes; the first of a row is predicted by nothing."""
        here = (inputs["labels"][:, 1:] != IGNORED).sum().to(self.accelerator.device)
        self.label_tokens.count += int(self.accelerator.reduce(here, "sum")) // self._tp_size
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the state of the bargain beside the loss, where there was one since the last time."""
        if self.bargain is not None and "loss" in logs:
            logs.update(self.bargain.state)
            self.bargain.state = {}
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None before the end: the card is that of the finished folder."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process writes files of its own
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.process_index == 0 and folder.is_dir():
            seal(folder)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        bare = getattr(model, "get_base_model", lambda: model)()
        out = Path(self.args.output_dir if output_dir is None else output_dir)
        writes = self.args.should_save  # all processes are here, and one of them writes
        with fused(model), carried_settings(bare, self.source, out) if writes else nullcontext():
            super()._save(output_dir, state_dict)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        missing = [name for name in load_result.missing_keys if name not in tied]
        if missing:
            raise TrainingError(f"the checkpoint lacks {missing[0]} and {len(missing) - 1} others; start anew")
        self.model.tie_weights()


class StageOneTrainer(StageOne, NamexTrainer):
    """`NamexTrainer` in StableMoE's first stage; the model's own balance loss is off, as StableMoE has another."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.aux_loss_enabled = self.model.config.output_router_logits = False


def last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that was written to its end, and whose files are as they were written.

    One of the last step is passed over: transformers would take a step more from there.
    """
    numbered = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1]), reverse=True)
    for path in numbered:
        listed = read_checked(path / SEAL)
        if isinstance(listed, dict) and STATE in listed and listed == _files(path, listed):
            state = json.loads((path / STATE).read_text("utf-8"))
            if state["global_step"] < state["max_steps"]:
                return str(path)
    return None


def seal(folder: Path) -> None:
    """Take down sizes and hashes of a checkpoint's files, so that a damaged one is not gone on from."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    write_checked(folder / SEAL, _files(folder, [name for name in names if name != SEAL]))


def _files(folder: Path, names: Iterable[str]) -> dict[str, list[int | str]]:
    """Size and hash of files; those that are gone are left out."""
    paths = {name: folder / name for name in names}
    return {name: [path.stat().st_size, hash_file(path)] for name, path in paths.items() if path.is_file()}
