"""``budget: damage``: layers keep different numbers of experts, both paths agree, and what was measured is measured."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import namex_hf.patching.live as live_module
from namex_hf import Recipe, patch_checkpoint, patch_model
from namex_hf.checkpoint.resolve import PACKAGED
from namex_hf.checkpoint.source import open_checkpoint
from namex_hf.errors import FamilyError, RecipeError
from namex_hf.evaluation.size import size_of
from namex_hf.families.outline import outline_of
from namex_hf.patching.budget import dealt_out, shorter, spend
from namex_hf.patching.text import text_for
from tests.helpers.checkpoints import differing, moe_layers, read_config, same_bits, settled_files
from tests.helpers.killing import Killing, start
from tests.helpers.runs import PROBE, live, load, logits, recipe_on

FAMILIES = ("qwen2_moe", "deepseek")
UNEQUAL = {"fit": "router", "budget": "damage"}


@pytest.fixture(scope="module")
def unequal(odd, words: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each family a folder of `UNEQUAL`; not to be changed."""
    folders = {family: tmp_path_factory.mktemp("unequal") / family for family in FAMILIES}
    for family, folder in folders.items():
        patch_checkpoint(odd(family, torch.float32, tokenizer=True), folder, recipe_on(words, **UNEQUAL))
    return folders


def numbers(config: dict[str, Any]) -> list[int]:
    return list(outline_of(config).shape.counts or ())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fit", ["router", "layer"])
def test_both_paths_agree(odd, words: Path, tmp_path: Path, family: str, fit: str) -> None:
    source = odd(family, torch.float32, tokenizer=True)
    recipe = recipe_on(words, budget="damage", fit=fit)
    report = patch_checkpoint(source, tmp_path / "out", recipe)
    stored, patched = load(tmp_path / "out"), live(source, recipe)
    assert type(stored) is type(patched)
    assert differing(stored.state_dict(), patched.state_dict()) == []
    assert same_bits(logits(stored), logits(patched))
    config = read_config(tmp_path / "out")
    counts = numbers(config)
    assert sum(counts) == 3 * len(moe_layers(read_config(source)))
    assert [layer["experts"] for layer in report.totals["budget"]] == counts
    assert stored.config.layer_experts == patched.config.layer_experts == config["layer_experts"]
    assert stored.config.num_experts == patched.config.num_experts == max(counts)
    for layer, count in zip(moe_layers(read_config(source)), counts, strict=True):
        for model in (stored, patched):
            block = model.model.layers[layer].mlp
            assert len(block.gate.weight) == len(block.experts.down_proj) == block.experts.num_experts == count


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_unequal_layers(odd, unequal: dict[str, Path], tmp_path: Path, family: str) -> None:
    """It trains with its auxiliary loss, is saved and opened again, and generates; its size is counted."""
    source = odd(family, torch.float32, tokenizer=True)
    model = load(unequal[family])
    found = model(PROBE, labels=PROBE, output_router_logits=True)
    most = model.config.num_experts
    assert [logit.shape[-1] for logit in found.router_logits] == [most] * len(moe_layers(read_config(source)))
    assert found.aux_loss.isfinite()
    (found.loss + found.aux_loss).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto").eval()
    assert differing(model.state_dict(), again.state_dict()) == []
    for implementation in ("eager", "grouped_mm"):
        again.set_experts_implementation(implementation)
        torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    assert again.generate(PROBE[:1], max_new_tokens=3, do_sample=False).shape == (1, PROBE.shape[1] + 3)
    size = size_of(open_checkpoint(unequal[family]))
    assert size.experts == 3
    assert size.bytes == sum(tensor.nbytes for tensor in model.state_dict().values())


def test_the_loss_that_is_measured_is_that_of_a_model_with_one_layer_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against transformers' own loss on the same held-out text, layer by layer."""
    recipe = Recipe(
        merge="grouped", experts=8, fit="router", budget="damage", calibration_tokens=4096, method="ep-camex"
    )
    tokenizer = AutoTokenizer.from_pretrained(PACKAGED / "tiny-deepseek")
    original = AutoModelForCausalLM.from_pretrained(PACKAGED / "tiny-deepseek", dtype=torch.float32).eval()
    kept: list[Any] = []

    def spied(*arguments: Any) -> Any:
        kept.append((arguments, spend(*arguments)))
        raise InterruptedError

    monkeypatch.setattr(live_module, "spend", spied)
    with pytest.raises(InterruptedError):
        patch_model(copy.deepcopy(original), recipe, tokenizer=tokenizer)
    (_, _, text, _), record = kept[0]
    chosen = shorter(text)
    ids, held_out = text.ids[chosen], text.held_out[chosen]
    loss = float(original(ids[held_out], labels=ids[held_out]).loss.detach())
    # The same merges, of single layers of whole models: all layers at once, on text that is not patched below.
    monkeypatch.undo()
    text_of = text_for(recipe, original.config.to_dict(), tokenizer)
    assert torch.equal(text_of.ids, text.ids)
    monkeypatch.setattr(live_module, "text_for", lambda *given: replace(text, ids=ids, sources=sources(text, ids)))
    alone = replace(recipe, budget="equal", fit="none", grouping="damage", curvature="calibrated", align="activations",
                    down="refit", target="layer", calibrate="before")  # fmt: skip
    merged = patch_model(copy.deepcopy(original), alone, tokenizer=tokenizer)
    for entry in record:
        one = copy.deepcopy(original)
        one.model.layers[entry["layer"]] = merged.model.layers[entry["layer"]]
        with torch.no_grad():
            damaged = float(one(ids[held_out], labels=ids[held_out]).loss)
        assert entry["loss"] == pytest.approx(max(0.0, damaged - loss), abs=2e-5)
        assert entry["errors"]["8"] > entry["errors"]["10"] > 0


def sources(text: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of some rows of a text."""
    rows = [int((text.ids == row).all(1).nonzero()[0]) for row in ids]
    return text.sources[rows]


def test_more_experts_where_they_are_worth_more() -> None:
    errors = {3: {1: 0.6, 4: 0.3, 6: 0.1}, 5: {1: 0.6, 4: 0.3, 6: 0.1}}
    record = dealt_out(errors, [0.9, 0.1], 4, 8)
    assert record[0]["layer"] == 3
    assert record[0]["experts"] > 4 > record[1]["experts"]
    assert [layer["experts"] for layer in dealt_out(errors, [0.0, 0.0], 4, 8)] == [4, 4]
    assert record[1] == {
        "layer": 5,
        "loss": 0.1,
        "errors": {"1": 0.6, "4": 0.3, "6": 0.1},
        "experts": record[1]["experts"],
    }


def test_all_experts_are_all(odd, words: Path, tmp_path: Path) -> None:
    source = odd("deepseek", torch.float32, tokenizer=True)
    experts = outline_of(read_config(source)).shape.experts
    patch_checkpoint(source, tmp_path / "out", recipe_on(words, **UNEQUAL, experts=experts))
    assert numbers(read_config(tmp_path / "out")) == [experts] * len(moe_layers(read_config(source)))
    assert same_bits(logits(load(tmp_path / "out")), logits(load(source)))


def test_killed_once_it_was_dealt_out(odd, words: Path, unequal: dict[str, Path], tmp_path: Path) -> None:
    """What was measured is not measured again, and all files are those of an undisturbed run."""
    source, recipe = odd("qwen2_moe", torch.float32, tokenizer=True), recipe_on(words, **UNEQUAL)
    process = start(source, tmp_path / "out", recipe, progress=Killing("layer 2: read", 1))
    process.join()
    assert process.exitcode == -9
    told: list[str] = []
    patch_checkpoint(source, tmp_path / "out", recipe, progress=lambda event: told.append(str(event)))
    assert not [what for what in told if what.endswith(": measured")]
    assert settled_files(tmp_path / "out") == settled_files(unequal["qwen2_moe"])


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"merge": "residual"}, "'budget' belongs to merge 'grouped'"),
        ({"merge": "grouped", "experts": 3}, "'budget' is measured on calibration text"),
        ({"merge": "grouped", "experts": 3, "fit": "router", "routing": "cosine"}, "and routing 'linear'"),
    ],
)
def test_where_it_means_nothing(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        Recipe(budget="damage", **fields)


def test_a_stock_export_is_refused(odd, words: Path, tmp_path: Path) -> None:
    source = odd("deepseek", torch.float32, tokenizer=True)
    with pytest.raises(RecipeError, match=r"as many experts in every layer: .*; found .*budget=damage"):
        patch_checkpoint(source, tmp_path / "out", recipe_on(words, **UNEQUAL), export_as="qwen2_moe")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("counts", [[3, 3], [3, 9, 3, 3], "3", [0, 3, 3, True]])
def test_counts_that_are_none(unequal: dict[str, Path], tmp_path: Path, counts: Any) -> None:
    shutil.copytree(unequal["deepseek"], tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = {**json.loads(path.read_text()), "layer_experts": counts}
    with pytest.raises(FamilyError, match=r"'layer_experts' is .*; accepted: a number for each of 4 layers"):
        outline_of(config)
    path.write_text(json.dumps(config))
    with pytest.raises(Exception, match="layer_experts"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
