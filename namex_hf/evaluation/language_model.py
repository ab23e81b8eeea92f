"""The model as lm-eval asks it: lm-eval's own class for transformers, with what this package needs besides.

Registered with lm-eval under the name ``namex``. Against ``hf`` it

* stores every response in a `ResultLog`, so that a killed run goes on, and sends each different request once;
* finds the batch size once for a kind of request: by trial on an accelerator, by arithmetic on a CPU;
* shares the requests out between the processes of ``accelerate launch`` on CPUs as well;
* has the context alone route what is scored where the recipe says ``routing_span: prompt``.

In all else the scores are those of ``hf``: with an equal batch size batch by batch the same tensors go in.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from ..checkpoint.tokenizer import check_ids
from ..models.configuration_namex import soft_choice
from ..progress import ProgressCallback, ProgressEvent, no_progress
from .batches import batches_of, fitting_batch
from .loading import without_balance_loss
from .prompt_routing import prompt_log_probabilities
from .store import ResultLog, key_of

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""Texts (None for a window of a longer text), tokens of the context, tokens of the continuation."""


@register_model("namex")
class NamexLM(HFLM):
    """A causal language model from a folder.

    Args:
        pretrained: a folder; a path, not a model, so that every process of ``accelerate launch`` loads its own.
        progress: called after every batch, with the kind of request and how many of them the batch has.
        **options: those of `HFLM`.
    """

    def __init__(self, pretrained: str, *, progress: ProgressCallback = no_progress, **options: Any) -> None:
        super().__init__(pretrained, **options)
        if hasattr(self, "accelerator"):  # HFLM leaves a process without several GPUs to itself
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        choice = soft_choice(getattr(self.config, "namex", None))
        self.routes_by_prompt = choice is not None and choice.span == "prompt"
        self.automatic = str(self.batch_size_per_gpu) == "auto"
        self.log: ResultLog | None = None
        self.progress = progress

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """As of `HFLM`, one batch after the other into the log."""
        kind = "windows" if requests and requests[0][0] is None else "choices"
        check_ids(self.model, max((max((*context, *rest), default=0) for _, context, rest in requests), default=0))
        longest = max((len(context) + len(rest) - 1 for _, context, rest in requests), default=0)
        size = override_bs or self._batch_size_of(kind, longest)
        batches = list(batches_of(requests, size, _by_length, lambda request: tuple(request[1] + request[2][:-1])))

        def ask(batch: list[Request]) -> list[Any]:
            if self.routes_by_prompt and kind == "choices":
                return prompt_log_probabilities(self.model, batch, self.max_length, self.device)
            return super(NamexLM, self)._loglikelihood_tokens(batch, disable_tqdm=True, override_bs=size)

        # What a context and a continuation are together does not tell where one ends, which prompt routing depends on.
        total = len(requests) if kind == "choices" else None  # windows come a batch at a time
        keys = [key_of(kind, context, rest) for _, context, rest in requests]
        answers = self._responses(kind, batches, lambda request: key_of(kind, request[1], request[2]), ask, total)
        return [(answers[key][0], bool(answers[key][1])) for key in keys]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As of `HFLM`. A text has no prompt: ``routing_span: prompt`` then routes as ``all`` does."""
        longest = max(len(self.tok_encode(request.args[0])) for request in requests)
        self.batch_size_per_gpu = self._batch_size_of("windows", min(longest, self.max_length))
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As of `HFLM`, one batch after the other into the log, but for what is drawn at random."""
        ids = {request.args[0]: self.tok_encode(request.args[0]) for request in requests}
        lengths = {text: len(tokens) for text, tokens in ids.items()}
        check_ids(
            self.model, max(self.tokenizer.pad_token_id or 0, *(max(tokens, default=0) for tokens in ids.values()))
        )
        new = max(request.args[1].get("max_gen_toks", self.max_gen_toks) for request in requests)
        size = self._batch_size_of("generated", min(max(lengths.values()) + new, self.max_length))

        def ask(batch: list[Instance]) -> list[Any]:
            self.batch_size_per_gpu = size
            with without_balance_loss(self.model):
                return super(NamexLM, self).generate_until(batch, disable_tqdm=True)

        if any(request.args[1].get("do_sample") for request in requests):
            return ask(requests)
        # Batches of one way to generate each, as in HFLM.
        order = _generated_order(lengths)
        ways: dict[str, list[Instance]] = {}
        for request in requests:
            ways.setdefault(repr(request.args[1]), []).append(request)
        batches = [batch for way in ways.values() for batch in batches_of(way, size, order, _asked)]
        answers = self._responses("generated", batches, _asked, ask, len(requests))
        return [answers[_asked(request)] for request in requests]

    def _responses(
        self,
        kind: str,
        batches: Sequence[list[Any]],
        key: Callable[[Any], str],
        ask: Callable[[list[Any]], list[Any]],
        total: int | None,
    ) -> dict[str, Any]:
        """Answers by key: known ones from the log, the others batch by batch."""
        known: dict[str, Any] = {}
        for batch in batches:
            different = {key(request): request for request in batch}
            if self.log is None or not all(one in self.log for one in different):
                answers = dict(zip(different, ask(list(different.values())), strict=True))
                if self.log is not None:
                    self.log.add(answers)
            else:
                answers = {one: self.log[one] for one in different}
            known.update(answers)
            self.progress(ProgressEvent(kind, amount=len(batch), total=total))
        return known

    def _batch_size_of(self, kind: str, longest: int) -> int:
        """The batch size for sequences of up to so many tokens; all processes come to the same."""
        if not self.automatic:
            return int(self.batch_size_per_gpu)
        if self.log is not None and kind in self.log:  # a run that goes on cuts its batches as before
            return int(self.log[kind])
        size = self._fitting_size(min(longest, self.max_length))
        if self.log is not None:
            self.log.add({kind: size})
        return size

    def _fitting_size(self, length: int) -> int:
        if self.device.type != "cpu":
            return self._detect_batch_size([(None, [0] * length, [0])], 0)
        free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        size = fitting_batch(length, self.model.config.vocab_size, self.model.dtype.itemsize, free)
        return int(self.all_gather(torch.tensor([size])).min())


def _by_length(request: Request) -> tuple[int, tuple[int, ...]]:
    tokens = request[1] + request[2]
    return -len(tokens), tuple(tokens)


def _generated_order(lengths: dict[str, int]) -> Callable[[Instance], tuple[int, str]]:
    return lambda request: (-lengths[request.args[0]], request.args[0])


def _asked(request: Instance) -> str:
    return key_of("generated", *request.args)
