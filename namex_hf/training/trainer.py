"""TRL's `SFTTrainer` for patched models: checkpoints that hold the experts, and the bargain between steps."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trl import SFTTrainer

from ..errors import TrainingError
from ..recipe import Recipe
from .bargain import BargainCallback

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


class NamexTrainer(SFTTrainer):
    """`SFTTrainer` for models whose experts are fused in memory.

    transformers saves experts one by one, and its `Trainer` loads a checkpoint without joining them again: it warns,
    and goes on with the experts that it began with. Here a checkpoint holds them as they are in memory, and one that
    lacks a parameter is refused. (`from_pretrained` reads both layouts.)

    Args:
        recipe: of the model; None: no bargain.
        bargain_every: optimiser steps from one bargain to the next; 0: none.
    """

    def __init__(self, *args: Any, recipe: Recipe | None = None, bargain_every: int = 0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.bargain = None
        if recipe is not None and bargain_every:
            self.bargain = BargainCallback(recipe, bargain_every)
            self.add_callback(self.bargain)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the state of the bargain beside the loss, where there was one since the last time."""
        if self.bargain is not None and "loss" in logs:
            logs.update(self.bargain.state)
            self.bargain.state = {}
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None before the end: the card is that of the finished folder."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with fused(self.accelerator.unwrap_model(self.model)):
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
