"""TRL's `SFTTrainer` for patched models: checkpoints with fused experts, the bargain between steps, and counts."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from trl import SFTTrainer

from ..errors import TrainingError
from ..evaluation.perplexity import IGNORED
from ..files import hash_file, read_checked, read_json, write_checked
from ..recipe import Recipe
from .bargain import BargainCallback
from .generation import carried_settings
from .stable_moe import StageOne

NUMBERED = re.compile(r"checkpoint-(\d+)")
STATE, SEAL = "trainer_state.json", "namex_seal.json"
"""Last files of a checkpoint: the trainer's state, then the sizes and hashes of all files."""


@contextmanager
def fused(model: Any) -> Iterator[None]:
    """Inside this context `model` is saved with the tensor names that it has in memory."""
    model = getattr(model, "get_base_model", lambda: model)()
    before = vars(model).get("_weight_conversions")
    model._weight_conversions = []
    try:
        yield
    finally:
        if before is None:
            del model._weight_conversions
        else:
            model._weight_conversions = before


class LabelTokens(TrainerCallback, ExportableState):
    """Number of tokens in the loss so far, stored in checkpoints and restored from them."""

    def __init__(self) -> None:
        self.count = 0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"count": self.count}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the count if training resumes from a checkpoint."""
        stored = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.count = stored["attributes"]["count"] if state.global_step else 0

    @classmethod
    def at(cls, checkpoint: Path) -> int:
        """The count in a checkpoint."""
        states = read_json(checkpoint / STATE, TrainingError)["stateful_callbacks"]
        return int(states[cls.__name__]["attributes"]["count"])


class NamexTrainer(SFTTrainer):
    """`SFTTrainer` for models whose experts are fused in memory.

    transformers saves every expert apart, and its `Trainer` does not fuse them when it loads a checkpoint: it warns,
    and continues with the initial experts. Here a checkpoint has fused experts, and is refused if it lacks a parameter.
    (`from_pretrained` reads both layouts.)

    Args:
        recipe: recipe of the model.
        bargain_every: optimiser steps between two bargains; 0: no bargain.
        source: folder of the checkpoint that training begins with, whose generation settings are copied.
    """

    def __init__(
        self,
        *args: Any,
        recipe: Recipe,
        bargain_every: int,
        source: Path,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.source, self.label_tokens = source, LabelTokens()
        self.add_callback(self.label_tokens)
        self.bargain = None
        if bargain_every:
            self.bargain = BargainCallback(recipe, bargain_every)
            self.add_callback(self.bargain)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As TRL's; also counts the labels on all processes, without the first of a row, which is not predicted."""
        labels = (inputs["labels"][:, 1:] != IGNORED).sum().to(self.accelerator.device)
        self.label_tokens.count += int(self.accelerator.reduce(labels, "sum")) // self._tp_size
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the state of the last bargain with the loss, once."""
        if self.bargain is not None and "loss" in logs:
            logs.update(self.bargain.state)
            self.bargain.state = {}
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card during training: the finished folder gets its own."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process writes its own files
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.process_index == 0 and folder.is_dir():
            seal(folder)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        bare = getattr(model, "get_base_model", lambda: model)()
        out = Path(self.args.output_dir if output_dir is None else output_dir)
        writes = self.args.should_save  # true on a single process
        with fused(model), carried_settings(bare, self.source, out) if writes else nullcontext():
            super()._save(output_dir, state_dict)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        missing = [name for name in load_result.missing_keys if name not in tied]
        if missing:
            raise TrainingError(f"the checkpoint lacks {missing[0]} and {len(missing) - 1} others; start anew")
        self.model.tie_weights()


class StageOneTrainer(StageOne, NamexTrainer):
    """`NamexTrainer` in StableMoE's first stage, which replaces the model's own balance loss."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.aux_loss_enabled = self.model.config.output_router_logits = False


def last_checkpoint(folder: Path) -> str | None:
    """The last complete and undamaged checkpoint.

    A checkpoint of the last step is skipped: transformers would take another step from there.
    """
    numbered = {int(match[1]): path for path in folder.glob("checkpoint-*") if (match := NUMBERED.fullmatch(path.name))}
    for _, path in sorted(numbered.items(), reverse=True):
        listed = read_checked(path / SEAL)
        if isinstance(listed, dict) and STATE in listed and listed == _files(path, listed):
            state = json.loads((path / STATE).read_text("utf-8"))
            if state["global_step"] < state["max_steps"]:
                return str(path)
    return None


def seal(folder: Path) -> None:
    """Record sizes and hashes of a checkpoint's files, so that no run resumes from a damaged checkpoint."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    write_checked(folder / SEAL, _files(folder, [name for name in names if name != SEAL]))


def _files(folder: Path, names: Iterable[str]) -> dict[str, list[int | str]]:
    """Size and hash of every file that exists."""
    paths = {name: folder / name for name in names}
    return {name: [path.stat().st_size, hash_file(path)] for name, path in paths.items() if path.is_file()}
