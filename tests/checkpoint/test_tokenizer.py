"""Tokenizers that do not open, that say nonsense, or that belong to another model: one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from namex_hf.checkpoint.resolve import PACKAGED
from namex_hf.checkpoint.tokenizer import check_ids, open_tokenizer
from namex_hf.errors import CheckpointError
from namex_hf.evaluation.arithmetic import exact_answers
from namex_hf.evaluation.perplexity import text_losses
from namex_hf.training.start import start_from

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        shutil.copy(PACKAGED / "tiny" / name, tmp_path / name)
    return tmp_path


def change(folder: Path, **fields: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("longest", ["512", 0, -1, float("nan"), [1], True])
def test_a_longest_text_that_is_no_number(folder: Path, longest: Any):
    change(folder, model_max_length=longest)
    with pytest.raises(CheckpointError) as caught:
        open_tokenizer(folder, "mine")
    assert str(caught.value) == (
        f"mine: model_max_length in tokenizer_config.json is {longest!r}; accepted: a number of tokens from 1"
    )


@pytest.mark.parametrize("longest", [1, 1e30, 10**40, None])
def test_a_longest_text_of_any_length(folder: Path, longest: Any):
    change(folder, model_max_length=longest)
    assert open_tokenizer(folder, "mine")("a")["input_ids"]


def test_a_tokenizer_that_does_not_open(folder: Path):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"^mine has no tokenizer that transformers can open \("):
        open_tokenizer(folder, "mine")


def test_a_tokenizer_with_more_tokens_than_the_embedding(folder: Path):
    tokenizer = open_tokenizer(folder, "mine", 4096)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folder)
    open_tokenizer(folder, "mine", 4097)
    with pytest.raises(CheckpointError, match=r"^mine: its tokenizer has token id 4096; the embedding has 4096 rows$"):
        open_tokenizer(folder, "mine", 4096)
    shutil.copy(PACKAGED / "tiny" / "config.json", folder / "config.json")
    shutil.copy(PACKAGED / "tiny" / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"its tokenizer has token id 4096; the embedding has 4096 rows$"):
        start_from(str(folder)).tokenizer()


def test_tokens_beyond_the_embedding_are_not_scored():
    model = AutoModelForCausalLM.from_pretrained(PACKAGED / "tiny", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(PACKAGED / "tiny")
    check_ids(model, 4095)
    tokenizer.add_tokens(["<more>"])
    said = r"^the tokenizer gives token id 4096; the embedding has 4096 rows$"
    with pytest.raises(CheckpointError, match=said):
        text_losses(model, tokenizer, {"a": "once <more> and once <more>"})
    with pytest.raises(CheckpointError, match=said):
        exact_answers(model, tokenizer, [{"question": "How many <more>?", "answer": "#### 1"}])
