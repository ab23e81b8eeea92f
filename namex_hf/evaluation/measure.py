"""One cell, in a process of its own: patched, scored, clocked."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.source import Checkpoint, open_checkpoint
from ..defaults import SHARD_SIZE
from ..errors import CheckpointError
from ..patching.plan import make_plan
from ..patching.run import Run
from ..patching.text import text_of
from ..patching.together import run_all
from ..progress import ProgressCallback, ProgressEvent
from ..quantising.folder import write_quantised
from ..quantising.matrices import Storage, matrices_of
from ..recipe import Recipe
from .closeness import window_closeness
from .equal_bytes import Quantising
from .generation import as_chat, generated_answers
from .loading import load, tokenizer_of, without_routed_experts
from .memory import forget_peak, peak_bytes
from .perplexity import text_ids, text_losses
from .problems.kinds import ALL
from .problems.problem import Problem
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

    ``losses`` by domain: nats a token of every window; ``right``: of the packaged problems one each, None where none is
    asked; ``answers``: of every kind ``right``, ``tokens``, ``cut`` and ``loops``, a problem each;
    ``experts``, ``bytes``, ``active``; ``prefill`` and ``decode``: tokens a second, None without routed experts, whose
    zeros are computed all the same, and of a quantised model, whose weights are dequantised; ``memory``: the most bytes
    while it is scored, None there too; ``closeness``: by measure and domain, a number a window, None where it is not
    asked for and of the original; ``seconds`` and ``peak_resident_bytes`` of the patching, None where nothing is
    patched; ``threads``; of a quantised model ``stored``, as `Storage`.

    Raises:
        NamexError: what the patching refuses, or a model whose losses are no numbers.
    """
    torch.set_num_threads(task.threads)
    seconds = peak = None
    scored = task.checkpoint
    if task.recipe is not None:
        assert task.out is not None
        plan = make_plan(task.checkpoint, task.recipe, SHARD_SIZE)
        [report] = run_all([Run(plan, task.out)], progress)
        totals = report.totals
        seconds, peak, scored = totals["seconds"], totals["peak_resident_bytes"], open_checkpoint(task.out)
    stored = {}
    if task.quantising is not None:
        assert task.out is not None
        stored = {"stored": asdict(_quantise(task, task.quantising, task.out, progress))}
        scored = open_checkpoint(task.out)
    clocked = task.routed and task.quantising is None
    counts = forget_peak(task.settings.device) and clocked
    model = load(scored.folder).to(task.settings.device)
    if not task.routed:
        model = without_routed_experts(model)
    tokenizer = tokenizer_of(task.checkpoint.folder)
    is_original = task.recipe is None and task.routed and task.quantising is None
    measured = scores(model, tokenizer, task.settings, progress, clocked)
    return {
        **measured,
        "memory": peak_bytes(task.settings.device) if counts else None,
        "closeness": None if is_original else _closeness(model, tokenizer, task, progress),
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
    answers = {kind: _answers(model, tokenizer, kind, problems, progress) for kind, problems in settings.made().items()}
    found_speed = _speed(model, tokenizer, settings, progress) if clocked else {"prefill": None, "decode": None}
    right = answers["packaged"]["right"] if "packaged" in answers else None
    return {"losses": losses, "right": right, "answers": answers, **found_speed}


def _answers(
    model: Any, tokenizer: Any, kind: str, problems: Sequence[Problem], progress: ProgressCallback
) -> dict[str, list[Any]]:
    """What is measured of each answer, in lists."""
    asked, found = ALL[kind], []
    chat = bool(problems[0].turns)
    for start in range(0, len(problems), BATCH):
        progress(ProgressEvent(f"problems, {kind}", done=start, total=len(problems)))
        part = problems[start : start + BATCH]
        prompts = [as_chat(tokenizer, one.turns) if chat else one.prompt for one in part]
        found += generated_answers(
            model, tokenizer, prompts, asked.NEW_TOKENS, BATCH, chat=chat, one_line=asked.ONE_LINE
        )
    right = [asked.check(one.text, problem) for one, problem in zip(found, problems, strict=True)]
    return {"right": right, **{name: [getattr(one, name) for one in found] for name in ("tokens", "cut", "loops")}}


def _closeness(
    model: Any, tokenizer: Any, task: CellTask, progress: ProgressCallback
) -> dict[str, dict[str, list[float]]] | None:
    if not task.settings.closeness:
        return None
    original = load(task.checkpoint.folder).to(task.settings.device)
    ids = text_ids(tokenizer, task.settings.texts, task.settings.tokens)
    found: dict[str, dict[str, list[float]]] = {"acceptance": {}, "divergence": {}}
    for done, (name, tokens) in enumerate(ids.items()):
        progress(ProgressEvent(f"closeness, {name}", done=done, total=len(ids)))
        window = min(WINDOW, model.config.max_position_embeddings)
        for measure, values in zip(found, window_closeness(original, model, tokens, window), strict=True):
            found[measure][name] = values
    return found


def _speed(model: Any, tokenizer: Any, settings: Settings, progress: ProgressCallback) -> dict[str, float]:
    progress(ProgressEvent("speed", total=1))
    text = next(iter(settings.texts.values()))
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
    return asdict(speed(model, ids, prompt=min(PROMPT, model.config.max_position_embeddings - NEW)))
