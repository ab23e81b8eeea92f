"""One cell, in a process of its own: patched, scored, clocked."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.source import Checkpoint, open_checkpoint
from ..defaults import SHARD_SIZE
from ..errors import CheckpointError
from ..patching.patch import run_plan
from ..patching.plan import make_plan
from ..patching.text import text_of
from ..progress import ProgressCallback, ProgressEvent
from ..quantising.folder import write_quantised
from ..quantising.matrices import Storage, matrices_of
from ..recipe import Recipe
from .arithmetic import exact_answers, held_out_problems
from .equal_bytes import Quantising
from .loading import load, tokenizer_of, without_routed_experts
from .perplexity import text_losses
from .settings import WINDOW, Settings
from .size import size_of
from .speed import NEW, PROMPT, speed

BATCH = 32  # problems answered together


@dataclass(frozen=True)
class CellTask:
    """What a process does."""

    label: str
    log: Path
    """Takes what the process prints."""
    checkpoint: Checkpoint
    settings: Settings
    recipe: Recipe | None = None
    """None: the model is scored as it is."""
    routed: bool = True
    """False: without its routed experts."""
    out: Path | None = None
    """Where the recipe or the quantiser writes its model."""
    threads: int = 1
    quantising: Quantising | None = None
    """None: the model is scored with the weights that it has."""


def measure(task: CellTask, progress: ProgressCallback) -> dict[str, Any]:
    """All that there is to know of a cell, plain.

    ``losses`` by domain: nats a token of every window; ``right``: a problem each, None where none is asked;
    ``experts``, ``bytes``, ``active``; ``prefill`` and ``decode``: tokens a second, None without routed experts, whose
    zeros are computed all the same, and of a quantised model, whose weights are dequantised; ``seconds`` and
    ``peak_resident_bytes`` of the patching, None where nothing is patched; ``threads``; of a quantised model
    ``stored``, as `Storage`.

    Raises:
        NamexError: what the patching refuses, or a model whose losses are no numbers.
    """
    torch.set_num_threads(task.threads)
    seconds = peak = None
    scored = task.checkpoint
    if task.recipe is not None:
        assert task.out is not None
        plan = make_plan(task.checkpoint, task.recipe, SHARD_SIZE)
        totals = run_plan(plan, task.out, progress=progress).totals
        seconds, peak, scored = totals["seconds"], totals["peak_resident_bytes"], open_checkpoint(task.out)
    stored = {}
    if task.quantising is not None:
        assert task.out is not None
        stored = {"stored": asdict(_quantise(task, task.quantising, task.out, progress))}
        scored = open_checkpoint(task.out)
    model = load(scored.folder).to(task.settings.device)
    if not task.routed:
        model = without_routed_experts(model)
    clocked = task.routed and task.quantising is None
    return {
        **scores(model, tokenizer_of(task.checkpoint.folder), task.settings, progress, clocked),
        **asdict(size_of(scored, task.routed)),
        "seconds": seconds,
        "peak_resident_bytes": peak,
        "threads": task.threads,
        **stored,
    }


def _quantise(task: CellTask, how: Quantising, out: Path, progress: ProgressCallback) -> Storage:
    """Write the model as its quantiser leaves it; returns what it takes in few bits."""
    matrices = matrices_of(task.checkpoint)
    ids = None if how.text is None else text_of(how.text, task.checkpoint).ids
    write_quantised(matrices, out, how.bits, ids, task.settings.device, progress)
    return matrices.storage(how.bits)


def scores(
    model: Any, tokenizer: Any, settings: Settings, progress: ProgressCallback, clocked: bool = True
) -> dict[str, Any]:
    """Losses, answers and speed of a loaded model. Speed comes last, when everything is warm.

    Raises:
        CheckpointError: losses that are no finite numbers.
    """
    losses = {}
    longest = model.config.max_position_embeddings
    for done, (name, text) in enumerate(settings.texts.items()):
        progress(ProgressEvent(f"perplexity, {name}", done=done, total=len(settings.texts)))
        each = text_losses(model, tokenizer, {name: text}, settings.tokens, min(WINDOW, longest))[name].tolist()
        if not all(map(math.isfinite, each)):
            raise CheckpointError(f"the model's losses on the text '{name}' are no finite numbers")
        losses[name] = each
    problems, right = held_out_problems()[: settings.problems], []
    for start in range(0, len(problems), BATCH):
        progress(ProgressEvent("word problems", done=start, total=len(problems)))
        right += exact_answers(model, tokenizer, problems[start : start + BATCH], BATCH)
    speeds = _speed(model, tokenizer, settings, progress) if clocked else {"prefill": None, "decode": None}
    return {"losses": losses, "right": right or None, **speeds}


def _speed(model: Any, tokenizer: Any, settings: Settings, progress: ProgressCallback) -> dict[str, float]:
    progress(ProgressEvent("speed", total=1))
    text = next(iter(settings.texts.values()))
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
    return asdict(speed(model, ids, prompt=min(PROMPT, model.config.max_position_embeddings - NEW)))
