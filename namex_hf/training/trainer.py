"""TRL's `SFTTrainer` for patched models: checkpoints that hold the experts, the bargain between steps, and counts."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from trl import SFTTrainer

from ..errors import TrainingError
from ..recipe import Recipe
from ..scoring.labelled import IGNORED
from .bargain import BargainCallback
from .generation import carried_settings

STATE = "trainer_state.json"


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
        states = json.loads((checkpoint / STATE).read_text("utf-8"))["stateful_callbacks"]
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

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        bare = getattr(model, "get_base_model", lambda: model)()
        out = Path(self.args.output_dir if output_dir is None else output_dir)
        with fused(model), carried_settings(bare, self.source, out):
            super()._save(output_dir, state_dict)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        missing = [name for name in load_result.missing_keys if name not in tied]
        if missing:
            raise TrainingError(f"the checkpoint lacks {missing[0]} and {len(missing) - 1} others; start anew")
        self.model.tie_weights()


def last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that was written to its end: the state of the trainer is its last file."""
    numbered = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1]), reverse=True)
    for path in numbered:
        try:
            json.loads((path / STATE).read_text("utf-8"))
        except (OSError, ValueError):
            continue
        return str(path)
    return None
