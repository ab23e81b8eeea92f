"""One model on one task of lm-eval: scored, stored, and not scored again."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.utils import handle_non_serializable

from ..checkpoint.identity import Identity, differing
from ..errors import CheckpointError, OutputError, TaskError
from ..files import HASH, hash_bytes, hash_file, read_json, write_text
from .language_model import NamexLM
from .samples import RESULTS, SAMPLES
from .store import ResultLog, sealed, unsealed
from .tasks import LoadedTask

ANSWERS = "answers"


def finished(folder: Path, identity: Mapping[str, Any], source: Identity) -> dict[str, Any] | None:
    """The results of this very run, if the folder has them, whole.

    Args:
        source: files of the model, which are read where their times are not those of the results.

    Raises:
        OutputError: it has another run's.
    """
    path = folder / RESULTS
    advice = "use --overwrite or another --out"
    try:
        stored = read_json(path)
    except CheckpointError:
        return None  # none, or damaged: the log has the responses
    if HASH not in stored:
        raise OutputError(f"{path} is of a release before 0.2.0; {advice}")
    results = unsealed(stored)
    if results is None or any(_hash_of(folder / name) != known for name, known in results["samples"].items()):
        return None
    if changed := differing(results["run"], json.loads(json.dumps(identity)), source):
        raise OutputError(f"{path} is of a run with another {changed}; {advice}")
    return results


def _hash_of(path: Path) -> str | None:
    return hash_file(path) if path.is_file() else None


def score(
    model: NamexLM,
    task: LoadedTask,
    folder: Path,
    identity: Mapping[str, Any],
    limit: int | None,
    seed: int,
    chat: bool = False,
) -> dict[str, Any]:
    """Results as lm-eval gives them, with ``run``; written with every sample into the folder. All processes call it.

    A run that was killed goes on from its log; the results are those of an undisturbed one.

    Args:
        limit: documents of every task; None: all.
        seed: of Python's, numpy's and torch's generators.
        chat: questions are turns of a chat, written by the chat template, and so are worked examples.

    Raises:
        TaskError: lm-eval refuses the task.
        CheckpointError: the tokenizer gives a token that the embedding has no row for.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (what lm-eval's tasks draw from)
    torch.manual_seed(seed)
    with ResultLog(folder / ANSWERS / f"answers-{model.rank}.jsonl", identity) as model.log:
        try:
            scores = evaluate(
                *(model, task.loaded),
                limit=limit,
                log_samples=True,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
            )
        except (AssertionError, ValueError) as error:  # lm-eval's answers to what it does not take
            raise TaskError(f"task {task.name}: lm-eval refuses it ({type(error).__name__}: {error})") from error
        batches = {kind: size for kind in ("choices", "windows", "generated") if (size := model.log.get(kind))}
    model.log = None
    if scores is not None:
        results = {"run": dict(identity), "batch_sizes": batches, **scores}
        hashes = {}
        for name, samples in results.pop("samples").items():
            ordered = sorted(samples, key=lambda sample: (sample["doc_id"], sample["filter"]))
            text = "".join(json.dumps(sample, default=handle_non_serializable) + "\n" for sample in ordered)
            write_text(folder / SAMPLES.format(name), text)
            hashes[SAMPLES.format(name)] = hash_bytes(text.encode())
        results = json.loads(json.dumps(results | {"samples": hashes}, default=_plain))
        write_text(folder / RESULTS, json.dumps(sealed(results), indent=1) + "\n")
    model.barrier()
    return json.loads((folder / RESULTS).read_text("utf-8"))


def _plain(value: Any) -> Any:
    """A task's functions by name."""
    return value.__name__ if callable(value) else handle_non_serializable(value)
