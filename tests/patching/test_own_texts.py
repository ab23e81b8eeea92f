"""Patching on texts that the caller hands over, in memory and on disk, and the events of a run in memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from namex_hf import ProgressEvent, Recipe, patch_checkpoint, patch_model
from namex_hf.errors import OutputError, RecipeError
from namex_hf.progress import FINISHED
from tests.helpers.checkpoints import differing, moe_layers, read_config, read_tensors
from tests.helpers.runs import TOKENS, load, recipe_on

FIELDS: dict[str, Any] = {"merge": "grouped", "experts": 3, "calibration_tokens": TOKENS}
WAYS = pytest.mark.parametrize(
    "fields", [{"fit": "router", "fit_steps": 10}, {"grouping": "damage", "budget": "damage"}], ids=["fit", "budget"]
)


@WAYS
def test_texts_are_read_as_a_file_of_them_is(odd, words: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    source = odd("qwen2_moe", torch.float32, tokenizer=True)
    of_file = patch_checkpoint(source, tmp_path / "file", recipe_on(words, **fields))
    recipe, texts = Recipe(**FIELDS, **fields), [words.read_text()]
    of_texts = patch_checkpoint(source, tmp_path / "texts", recipe, texts=texts)
    assert differing(read_tensors(tmp_path / "texts"), read_tensors(tmp_path / "file")) == []
    model = patch_model(load(source), recipe, AutoTokenizer.from_pretrained(source), texts=texts)
    assert differing(load(tmp_path / "texts").state_dict(), model.state_dict()) == []
    assert of_texts.run["calibration"] == {**of_file.run["calibration"], "name": "own texts"}
    assert model.config.namex == read_config(tmp_path / "texts")["namex"]
    assert model.config.namex["calibration_data"] == "own texts"


def test_other_texts_are_another_run(odd, words: Path, tmp_path: Path) -> None:
    source, text = odd("qwen2_moe", torch.float32, tokenizer=True), words.read_text()
    first = patch_checkpoint(source, tmp_path / "out", Recipe(**FIELDS, fit="router", fit_steps=10), texts=[text])
    again = Recipe(**FIELDS, fit="router", fit_steps=10)
    assert patch_checkpoint(source, tmp_path / "out", again, texts=[text]) == first
    with pytest.raises(OutputError):
        patch_checkpoint(source, tmp_path / "out", again, texts=[text[: len(text) // 2]])


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (Recipe(), "this recipe reads no text; accepted with texts"),
        (recipe_on(Path("a.txt"), fit="router"), "'calibration_data' is 'a.txt'; accepted beside texts: no value"),
    ],
    ids=["no text", "other text"],
)
def test_a_recipe_that_has_no_use_for_them(odd, tmp_path: Path, recipe: Recipe, says: str) -> None:
    source = odd("qwen2_moe", torch.float32, tokenizer=True)
    with pytest.raises(RecipeError, match=says):
        patch_checkpoint(source, tmp_path / "out", recipe, texts=["a"])
    assert not (tmp_path / "out").exists()
    model = load(source)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RecipeError, match=says):
        patch_model(model, recipe, AutoTokenizer.from_pretrained(source), texts=["a"])
    assert differing(before, model.state_dict()) == []


@pytest.mark.parametrize("fields", [{}, {"fit": "router", "fit_steps": 10}], ids=["no text", "text"])
def test_events_in_memory(odd, words: Path, fields: dict[str, Any]) -> None:
    """Every layer is finished once, in its order; stages of a layer lie before its end."""
    source, events = odd("deepseek", torch.float32, tokenizer=True), list[ProgressEvent]()
    recipe = recipe_on(words, **fields) if fields else Recipe(merge="grouped", experts=3)
    patch_model(load(source), recipe, AutoTokenizer.from_pretrained(source), progress=events.append)
    layers = moe_layers(read_config(source))
    finished = [event for event in events if event.stage == FINISHED]
    assert [(one.layer, one.done, one.total, one.amount) for one in finished] == [
        (layer, number, len(layers), 1) for number, layer in enumerate(layers, 1)
    ]
    assert {event.total for event in events} == {len(layers)}
    assert [event.layer for event in events] == sorted(event.layer for event in events if event.layer is not None)
    read = [event.layer for event in events if event.stage == "read"]
    assert [*dict.fromkeys(read)] == (layers if fields else [])
