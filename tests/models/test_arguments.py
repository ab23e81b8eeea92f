"""Forwards of the patched models under other names of their arguments, and what others read off their signatures."""

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache, Qwen2MoeForCausalLM, Qwen2MoeModel, Trainer, TrainingArguments

from namex_hf.models.arguments import Arguments, cache_in

MERGES = [
    ("qwen2_moe", {"merge": "residual"}),
    ("qwen2_moe", {"merge": "soft", "segment": 4, "routing": "stable"}),
    ("qwen2_moe", {"merge": "soft", "segment": 4, "method": "smear"}),
    ("deepseek", {"merge": "residual", "routing": "cosine"}),
    ("deepseek", {"merge": "soft", "segment": 4}),
    ("qwen2_moe", {"merge": "soft"}),
]
over_merges = pytest.mark.parametrize(("family", "fields"), MERGES, ids=str)
GREEDY = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": None, "pad_token_id": 0}


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def silence() -> Iterator[None]:
    """Neither Python nor transformers warns, not even of what it warns of once in a process."""
    logger, records = logging.getLogger("transformers"), Records()
    type(logger).warning_once.cache_clear()
    logger.addHandler(records)
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            yield
    finally:
        logger.removeHandler(records)
    assert [str(one.message) for one in found] == []
    assert records.lines == []


def before_5_24(hidden, past_key_values: DynamicCache | None = None, use_cache: bool = True):
    """A forward as old versions name its arguments."""


def since_5_24(hidden, cache: DynamicCache | None = None, use_cache: bool = True):
    """A forward as newer versions do."""


def in_days_to_come(hidden, memory: "Cache | None" = None, use_cache: bool = True):  # noqa: F821
    """A forward under a name that nobody has thought of."""


@pytest.mark.parametrize(
    ("forward", "name"), [(before_5_24, "past_key_values"), (since_5_24, "cache"), (in_days_to_come, "memory")]
)
def test_a_cache_arrives_under_any_name(forward, name):
    takes, cache = Arguments.of(forward), DynamicCache()
    for given in ("past_key_values", "cache", "memory"):
        assert takes.by_name((), {given: cache, "use_cache": True}) == {name: cache, "use_cache": True}
    assert takes.by_name((), {"past_key_values": None}) == {"past_key_values": None}
    assert cache_in({"use_cache": True, "whatever": cache}) is cache
    assert cache_in({"use_cache": True}) is None


def test_arguments_by_position_get_their_names():
    names = Arguments.of(Qwen2MoeForCausalLM.forward).names
    assert names[:3] == ("input_ids", "attention_mask", "position_ids")
    found = Arguments.of(Qwen2MoeModel.forward).by_name((1, 2), {"position_ids": 3})
    assert found == {"input_ids": 1, "attention_mask": 2, "position_ids": 3}


@over_merges
@torch.no_grad()
def test_both_names_of_the_cache_give_what_no_cache_gives(namex_model, tokens, family, fields):
    model = namex_model(family, **fields)
    whole = model(tokens, use_cache=False).logits
    for name in ("past_key_values", "cache"):
        cache = DynamicCache(config=model.config)
        with silence():
            parts = [model(tokens[:, a:b], **{name: cache}).logits for a, b in ((0, 5), (5, 6), (6, 11))]
        assert (torch.cat(parts, 1) - whole).abs().max() < 2e-5
        assert cache.get_seq_length() == 11
    by_position = model.model(tokens, torch.ones_like(tokens)).last_hidden_state
    assert torch.equal(by_position, model.model(input_ids=tokens, attention_mask=torch.ones_like(tokens))[0])


@over_merges
def test_generation_warns_of_nothing(namex_model, tokens, family, fields):
    model = namex_model(family, **fields)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    for beams in (1, 2):
        with silence():
            cached = model.generate(**inputs, num_beams=beams, **GREEDY)
            uncached = model.generate(**inputs, num_beams=beams, use_cache=False, **GREEDY)
        assert cached.shape == (2, 20)
        assert torch.equal(cached, uncached)


@over_merges
def test_a_step_of_training_warns_of_nothing(namex_model, tokens, family, fields):
    model = namex_model(family, **fields).train()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with silence():
            model(tokens, labels=tokens, use_cache=False).loss.backward()


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek"])
def test_the_signature_is_the_stock_one(namex_model, tmp_path, family):
    """`Trainer` drops every column of the data that is not in it, and `generate` asks for what it finds there."""
    model = namex_model(family, merge="soft", segment=4)
    assert inspect.signature(type(model).forward) == inspect.signature(Qwen2MoeForCausalLM.forward)
    assert inspect.signature(type(model.model).forward) == inspect.signature(Qwen2MoeModel.forward)
    trainer = Trainer(model, TrainingArguments(tmp_path, use_cpu=True, report_to=[]))
    trainer._set_signature_columns_if_needed()
    assert {"input_ids", "attention_mask", "position_ids", "labels"} <= set(trainer._signature_columns)
    assert trainer.label_names == ["labels"]
    assert model._supports_logits_to_keep()


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek"])
def test_evaluation_leaves_the_cache_out(namex_model, tokens, tmp_path, family):
    model = namex_model(family, merge="soft", segment=4)
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to=[], per_device_eval_batch_size=2)
    predicted = Trainer(model, arguments).predict(rows).predictions
    assert torch.equal(torch.as_tensor(predicted), model(tokens).logits.detach())
