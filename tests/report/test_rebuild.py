"""A patched model that another training loop has saved: its report is computed again, and what is not known is null."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Trainer, TrainingArguments

from namex_hf import Recipe, load_patched, patch_checkpoint
from namex_hf.checkpoint.folder import fault
from namex_hf.commands.push import main as push
from namex_hf.errors import CheckpointError
from namex_hf.report.folder import open_patched
from namex_hf.report.write import write_pictures
from namex_hf.training.bargain import rebargain


def saved(folder: Path, source: str, recipe: Recipe) -> tuple[Path, Any]:
    """A folder of `Trainer.save_model`, and the model with other experts than the patch has left."""
    patch_checkpoint(source, folder / "patched", recipe)
    model, tokenizer = load_patched(folder / "patched"), AutoTokenizer.from_pretrained(folder / "patched")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    arguments = TrainingArguments(str(folder / "run"), report_to="none", use_cpu=True)
    Trainer(model, arguments, processing_class=tokenizer).save_model(str(folder / "saved"))
    return folder / "saved", model


@pytest.mark.parametrize(
    ("source", "recipe"),
    [("tiny", Recipe()), ("tiny-deepseek", Recipe()), ("tiny", Recipe(first_layer="sparse", gamma=0.5))],
)
def test_games_are_those_of_the_saved_tensors(tmp_path: Path, source: str, recipe: Recipe):
    folder, model = saved(tmp_path, source, recipe)
    found = open_patched(folder)
    stored = json.loads((folder / "namex/report.json").read_text())
    assert stored["source"] == dict.fromkeys(("name", "commit", "fingerprint", "bytes", "patched"))
    assert stored["run"] == {"recipe": recipe.to_dict(), "rebuilt": True}
    assert stored["training"] is None
    expected = rebargain(model, recipe, write=False)
    assert [one.layer for one in expected] == [one["layer"] for one in stored["layers"]] == list(found.shape.layers)
    for one, record in zip(expected, stored["layers"], strict=True):
        assert record["drift"] is record["seconds"] is None
        for game, noted in zip(one.record, record["games"], strict=True):
            assert noted["weights"] == pytest.approx(game["weights"], rel=1e-4)
            assert noted["norms"] == pytest.approx(game["norms"], rel=1e-4)
        torch.testing.assert_close(found.cosines[one.layer], one.cosines, atol=1e-5, rtol=0)
    written = {path: path.read_bytes() for path in (folder / "namex").iterdir()}
    assert open_patched(folder).report == found.report
    assert {path: path.read_bytes() for path in (folder / "namex").iterdir()} == written


def test_it_can_be_pushed_and_its_card_says_what_is_not_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, _ = saved(tmp_path, "tiny", Recipe(merge="grouped", experts=12))
    assert push([str(folder), "--repo", "me/mine", "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "note: namex/report.json was missing and is rebuilt; the source of the model is not known" in said
    assert "training_args.bin: a pickle" in said
    text = (folder / "README.md").read_text()
    assert "Made of a model that is not known" in text
    assert "The source, and what the model was trained on, are not recorded." in text
    assert "Report rebuilt with `namex_hf`" in text
    assert "None" not in text
    assert "base_model" not in text
    (folder / "training_args.bin").unlink()  # it does not go up, and is not missed
    assert fault(folder, verify=True) is None
    assert (folder / "model.safetensors.index.json").is_file()


def test_it_is_drawn(tmp_path: Path):
    folder, _ = saved(tmp_path, "tiny", Recipe())
    page = write_pictures(folder, tokens=0)
    assert "How alike the experts are" in page.read_text()
    assert "<dt>time</dt>" not in page.read_text()


def test_a_card_that_is_there_stays(tmp_path: Path):
    folder, _ = saved(tmp_path, "tiny", Recipe())
    (folder / "README.md").write_text("mine")
    open_patched(folder)
    assert (folder / "README.md").read_text() == "mine"


def test_experts_that_are_no_numbers_are_refused(tmp_path: Path):
    folder, _ = saved(tmp_path, "tiny", Recipe())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.experts.3.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"^saved: layer 2, .*"):
        open_patched(folder)
    assert not (folder / "namex").exists()
