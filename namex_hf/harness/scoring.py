"""One model on one task: asked, kept, and never asked again for what is known."""

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
from .items import RESULTS, SAMPLES
from .journal import Journal
from .language_model import NamexLM
from .tasks import Chosen

JOURNAL = "answers"


def finished(folder: Path, identity: Mapping[str, Any], source: Identity) -> dict[str, Any] | None:
    """The results of this very run, if the folder has them, whole.

    Args:
        source: files of the model, which are read where their times are not those of the results.

    Raises:
        OutputError: it has another run's.
    """
    path = folder / RESULTS
    try:
        results = read_json(path)
        found, digest, samples = results["run"], results.pop(HASH, None), results.get("samples", {})
    except (CheckpointError, KeyError, TypeError, AttributeError):
        return None  # none, or damaged: the journal has the answers
    if digest is None:
        raise OutputError(f"{path} is of a release before 0.2.0; use --overwrite or another --output_path")
    if digest != _hash(results) or any(_hash_of(folder / name) != known for name, known in samples.items()):
        return None
    if changed := differing(found, json.loads(json.dumps(identity)), source):
        raise OutputError(f"{path} is of a run with another {changed}; use --overwrite or another --output_path")
    return results


def _hash(results: Mapping[str, Any]) -> str:
    return hash_bytes(json.dumps(results).encode())


def _hash_of(path: Path) -> str | None:
    return hash_file(path) if path.is_file() else None


def score(
    model: NamexLM, task: Chosen, folder: Path, identity: Mapping[str, Any], limit: int | None, seed: int
) -> dict[str, Any]:
    """Results as lm-eval gives them, with ``run``; written with every sample into the folder. All processes call it.

    A run that was killed goes on from its journal; the results are those of an undisturbed one.

    Args:
        limit: documents of every task; None: all.
        seed: of Python's, numpy's and torch's generators.

    Raises:
        TaskError: lm-eval refuses the task.
        CheckpointError: the tokenizer gives a token that the embedding has no row for.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (what lm-eval's tasks draw from)
    torch.manual_seed(seed)
    with Journal(folder / JOURNAL, identity, model.rank) as model.journal:
        try:
            found = evaluate(model, task.loaded, limit=limit, log_samples=True)
        except (AssertionError, ValueError) as error:  # lm-eval's answers to what it does not take
            raise TaskError(f"task {task.name}: lm-eval refuses it ({type(error).__name__}: {error})") from error
        batches = {kind: size for kind in ("choices", "windows", "generated") if (size := model.journal.batch(kind))}
    model.journal = None
    if found is not None:
        results = {"run": dict(identity), "batch_sizes": batches, **found}
        hashes = {}
        for name, samples in results.pop("samples").items():
            ordered = sorted(samples, key=lambda sample: (sample["doc_id"], sample["filter"]))
            text = "".join(json.dumps(sample, default=handle_non_serializable) + "\n" for sample in ordered)
            write_text(folder / SAMPLES.format(name), text)
            hashes[SAMPLES.format(name)] = hash_bytes(text.encode())
        results = json.loads(json.dumps(results | {"samples": hashes}, default=_plain))
        write_text(folder / RESULTS, json.dumps(results | {HASH: _hash(results)}, indent=1) + "\n")
    model.barrier()
    return json.loads((folder / RESULTS).read_text("utf-8"))


def _plain(value: Any) -> Any:
    """A task's functions by name."""
    return value.__name__ if callable(value) else handle_non_serializable(value)
