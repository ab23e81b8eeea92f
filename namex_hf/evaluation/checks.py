"""What would fail when a model is loaded or in the middle of a run, checked before any weights are read."""

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import psutil
import torch
from lm_eval.models.utils import normalize_gen_kwargs, resolve_max_length
from transformers import AutoConfig

from ..checkpoint.source import Checkpoint
from ..checkpoint.tokenizer import open_tokenizer
from ..errors import CheckpointError, TaskError
from .candidates import Candidate, bytes_in
from .tasks import LoadedTask


def check_answers(
    checkpoint: Checkpoint,
    tasks: Sequence[LoadedTask],
    limit: int | None,
    trust_remote_code: bool,
    chat: bool = False,
) -> None:
    """Whether a model's tokenizer opens and writes what is asked, and all answers fit into what the model attends to.

    Args:
        limit: documents of every task; None: all.
        trust_remote_code: of the tokenizer and the configuration.
        chat: whether questions are written by the chat template.

    Raises:
        CheckpointError: transformers cannot open the tokenizer or the configuration, or there is no chat template.
        TaskError: an answer that leaves no token for its question.
    """
    tokenizer = open_tokenizer(checkpoint.folder, checkpoint.name, trust_remote_code=trust_remote_code)
    if chat and not tokenizer.chat_template:
        raise CheckpointError(f"{checkpoint.name} has no chat template; --apply_chat_template needs one")
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
        longest = resolve_max_length(config, tokenizer)
    except Exception as error:  # whatever a configuration of others raises
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{checkpoint.name}/config.json: transformers does not take it ({reason})") from error
    for task in (one for chosen in tasks for one in chosen.tasks.items()):
        for what, count in _lengths(*task, limit, tokenizer, longest):
            if count > longest:
                raise TaskError(
                    f"task {task[0]}: {what} of {count} tokens; {checkpoint.name} attends to {longest}, and at least "
                    "one is the question's"
                )


def _lengths(name: str, task: Any, limit: int | None, tokenizer: Any, longest: int) -> Iterator[tuple[str, int]]:
    """What is answered, and its tokens. An answer of few bytes has no more tokens than these and is left out."""
    kind = task.OUTPUT_TYPE
    if kind == "generate_until":
        yield "an answer", int(normalize_gen_kwargs(task.config.generation_kwargs or {})["max_gen_toks"]) + 1
    if kind not in ("multiple_choice", "loglikelihood"):
        return
    several = getattr(task, "multiple_input", 0)
    for number, document in enumerate(islice(task.eval_docs, limit)):
        requests = task.construct_requests(document, [""] if several else "", metadata=(name, number, 1))
        for request in requests if isinstance(requests, list) else [requests]:
            if len(request.args[1].encode()) > longest:
                count = len(tokenizer(request.args[1], add_special_tokens=False, verbose=False).input_ids)
                yield f"document {number} has an answer", count


def free_bytes(device: str, parallelize: bool) -> tuple[int, str]:
    """Bytes that a process may fill with weights, and where. Processes of one machine share its CPU memory."""
    if torch.device(device).type == "cpu":
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return psutil.virtual_memory().available // processes, f"of memory for each of {processes} processes"
    if parallelize:
        count = torch.accelerator.device_count()
        return sum(torch.accelerator.get_memory_info(i)[0] for i in range(count)), f"on {count} devices"
    return torch.accelerator.get_memory_info(torch.device(device))[0], f"on {device}"


def check_fits(rows: list[Candidate], device: str, dtype: str, parallelize: bool = False) -> None:
    """Raises:
    CheckpointError: a model whose weights alone are larger than what is free.
    """
    free, where = free_bytes(device, parallelize)
    for row in rows:
        added = 0 if row.plan is None else row.plan.all_added_bytes + row.plan.untied_bytes
        needed = bytes_in(row.checkpoint, dtype) + added
        if needed > free:
            more = "" if parallelize or torch.device(device).type == "cpu" else ", or --parallelize over several"
            raise CheckpointError(
                f"{row.checkpoint.name}: its weights take {needed / 1e9:.2f} GB in {dtype}, and {free / 1e9:.2f} GB "
                f"are free {where}; accepted: a smaller --dtype{more}"
            )
