"""``merge: grouped`` on calibration text: both paths agree, the record is true, stock transformers opens the result."""

import json
import random
import subprocess
import sys
import weakref
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from namex_hf import Recipe, patch_checkpoint, patch_model
from namex_hf.errors import CalibrationError, CheckpointError, FamilyError
from namex_hf.merging import rewriting
from namex_hf.patching import checkpoint_source
from namex_hf.patching.text import text_for
from namex_hf.progress import ProgressEvent
from tests.helpers.checkpoints import (
    all_files,
    differing,
    moe_layers,
    read_config,
    read_tensors,
    rewrite_tensors,
    same_bits,
    shared_name,
)
from tests.helpers.recipes import SHRUNK
from tests.helpers.runs import PROBE, TOKENS, block_inputs, block_output, live, load, logits, recipe_on, refused
from tests.helpers.toy_models import FAMILIES, write_words

LAYER_NAMES = {"qwen2_moe": [0, 2, 3], "deepseek": [1, 2, 3]}


def test_every_choice_is_heard(odd, words: Path, tmp_path: Path) -> None:
    """No two recipes give the same experts: a choice that is ignored would pass every equality of paths."""
    source = odd("qwen2_moe", torch.float32, tokenizer=True)
    recipes = {**SHRUNK, "weights": {"power": "usage", "grouping": "weights"}, "seed": {"fit": "router", "seed": 1}}
    recipes |= {
        "longer": {"fit": "router", "calibration_tokens": 2 * TOKENS},
        "steps": {"fit": "router", "fit_steps": 60},
        "longer fit": {"fit": "layer", "fit_steps": 60},
        "other draw": {"fit": "layer", "operator": "random", "seed": 1},
        "kept by saliency": {"fit": "router", "operator": "keep", "weighting": "saliency"},
        "most used": {"operator": "keep", "grouping": "none", "down": "refit"},
        "not random": {"fit": "layer", "method": "ep-camex", "curvature": "identity", "align": "none"},
        "not shared": {
            "fit": "router",
            "method": "ep-camex",
            "curvature": "identity",
            "align": "none",
            "down": "merge",
        },
        "as they are": {"operator": "keep", "grouping": "none", "weighting": "saliency"},
    }
    results: dict[str, dict[str, torch.Tensor]] = {}
    for name, fields in recipes.items():
        patch_checkpoint(source, tmp_path / name, recipe_on(words, **fields))
        results[name] = read_tensors(tmp_path / name)
    for name, result in results.items():
        for other in set(results) - {name}:
            assert differing(result, results[other]), f"{name} and {other} are one"


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_experts_are_those_of_the_source(odd, words: Path, tmp_path: Path, family: str) -> None:
    """Byte for byte, with their rows, in the order of their groups: pruned out of core."""
    source = odd(family, torch.bfloat16, tokenizer=True)
    report = patch_checkpoint(source, tmp_path / "out", recipe_on(words, operator="keep", grouping="router"))
    before, after = read_tensors(source), read_tensors(tmp_path / "out")
    for record in report.layers:
        block, kept = f"model.layers.{record['layer']}.mlp", record["kept"]
        assert [max(group, key=lambda number: record["usage"][number]) for group in record["groups"]] == kept
        assert same_bits(after[f"{block}.gate.weight"], before[f"{block}.gate.weight"][kept])
        for (place, number), name in product(enumerate(kept), ("gate_proj", "up_proj", "down_proj")):
            tensors = after[f"{block}.experts.{place}.{name}.weight"], before[f"{block}.experts.{number}.{name}.weight"]
            assert same_bits(*tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_control_begins_at_its_own_layer_s_shared_expert(odd, words: Path, tmp_path: Path, family: str) -> None:
    """Of three slices four experts, which a fit of the rows leaves alone."""
    source = odd(family, torch.bfloat16, tokenizer=True)
    patch_checkpoint(source, tmp_path / "out", recipe_on(words, **{**SHRUNK["shared"], "experts": 4}))
    before, after = read_tensors(source), read_tensors(tmp_path / "out")
    for layer, number in product(moe_layers(read_config(source)), range(4)):
        block, part = f"model.layers.{layer}.mlp", slice(number % 3 * 8, number % 3 * 8 + 8)
        whole = f"{block}.{shared_name(read_config(source))}"
        for name in ("gate_proj", "up_proj"):
            rows = before[f"{whole}.{name}.weight"][part]
            assert same_bits(after[f"{block}.experts.{number}.{name}.weight"], rows)
        columns = before[f"{whole}.down_proj.weight"][:, part]
        assert same_bits(after[f"{block}.experts.{number}.down_proj.weight"], columns)


def test_the_seed_draws_batches_too(odd, tmp_path: Path) -> None:
    """On a text that is the same in any order: one sequence, many times."""
    lines = [json.dumps({"text": " ".join(f"w{3 + n % 50}" for n in range(63))})] * 16  # and an end of text
    (tmp_path / "same.jsonl").write_text("\n".join(lines))
    source = odd("qwen2_moe", torch.float32, tokenizer=True)
    reports = [
        patch_checkpoint(source, tmp_path / f"{seed}", recipe_on(tmp_path / "same.jsonl", fit="router", seed=seed))
        for seed in (0, 1)
    ]
    assert reports[0].run["calibration"] == reports[1].run["calibration"]
    assert differing(read_tensors(tmp_path / "0"), read_tensors(tmp_path / "1"))


@torch.no_grad()
def layer_output(model: Any, layer: int, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states ``[sequences, length, hidden]`` above a layer."""
    seen: list[torch.Tensor] = []
    handle = model.model.layers[layer].register_forward_hook(lambda module, given, output: seen.append(output))
    model(ids)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("calibrate", "target"), [("after", "layer"), ("after", "model"), ("before", "layer")])
@pytest.mark.parametrize("weights", ["none", "sequence"])
def test_the_record_is_what_transformers_sees(
    odd, words: Path, tmp_path: Path, family: str, calibrate: str, target: str, weights: str
) -> None:
    """Errors, tokens and mass of every layer again, by hooks in transformers' own model on the same text.

    ``after``: every layer's inputs are what the patched model has there; ``before``: what the original has. Errors are
    relative to the original's routed output, under ``target: model`` to what brings the patched model's hidden states
    to the original's; under ``error_weights: sequence`` every sequence as heavy as any other.
    """
    how = {"fit": "router", "calibrate": calibrate, "target": target, "error_weights": weights}
    source, recipe = odd(family, torch.float32, tokenizer=True), recipe_on(words, **how)
    report = patch_checkpoint(source, tmp_path / "out", recipe)
    text = text_for(recipe, read_config(source), AutoTokenizer.from_pretrained(source))
    original, patched = load(source), load(tmp_path / "out")
    assert [layer["layer"] for layer in report.layers] == moe_layers(read_config(source)) == LAYER_NAMES[family]
    for record in report.layers:
        layer = record["layer"]
        inputs = block_inputs(patched if calibrate == "after" else original, layer, text.ids)
        wanted, index, value = block_output(original, layer, inputs)
        found, _, _ = block_output(patched, layer, inputs)
        if target == "model":
            wanted = layer_output(original, layer, text.ids) - (layer_output(patched, layer, text.ids) - found)
        error, energy = (part.square().sum((1, 2)) for part in (found - wanted, wanted))
        relative = (error / energy).mean() if weights == "sequence" else error.sum() / energy.sum()
        assert record["errors"][-1]["error"] == pytest.approx(float(relative), rel=2e-3)
        usage = [int((index == expert).sum()) for expert in range(7)]
        mass = [float(value[index == expert].sum()) for expert in range(7)]
        assert sum(abs(one - other) for one, other in zip(record["usage"], usage, strict=True)) <= 4  # ties
        assert record["mass"] == pytest.approx(mass, abs=1)


@pytest.mark.parametrize("weights", ["none", "source", "sequence"])
@pytest.mark.parametrize("fields", [{"fit": "router"}, {"merge": "narrow", "width": 16, "experts": None}], ids=str)
def test_errors_count_as_the_recipe_says(odd, tmp_path: Path, fields: dict[str, Any], weights: str) -> None:
    """On a text of two files, one of them a single word over and over."""
    (tmp_path / "texts").mkdir()
    write_words(tmp_path / "texts" / "words.txt", 1)
    (tmp_path / "texts" / "word.txt").write_text("\n\n".join(["w50 " * 40] * 90))
    source = odd("qwen2_moe", torch.float32, tokenizer=True, moe_intermediate_size=24)
    recipe = recipe_on(tmp_path / "texts", error_weights=weights, **fields)
    report = patch_checkpoint(source, tmp_path / "out", recipe)
    text = text_for(recipe, read_config(source), AutoTokenizer.from_pretrained(source))
    original, patched = load(source), load(tmp_path / "out")
    inputs = block_inputs(original, 0, text.ids)
    wanted, found = (block_output(model, 0, inputs)[0] for model in (original, patched))
    error, energy = (part.square().sum((1, 2)).double() for part in (found - wanted, wanted))
    labels = {"none": torch.zeros(len(energy)), "source": text.sources, "sequence": torch.arange(len(energy))}[weights]
    each = [float(error[labels == one].sum() / energy[labels == one].sum()) for one in labels.unique()]
    counts = [int((labels == one).sum()) for one in labels.unique()]
    expected = sum(one * count for one, count in zip(each, counts, strict=True)) / len(energy)
    assert len(each) == {"none": 1, "source": 2, "sequence": len(energy)}[weights]
    assert report.layers[0]["errors"][-1]["error"] == pytest.approx(expected, rel=2e-3)


def test_the_report(odd, words: Path, tmp_path: Path) -> None:
    """What is written down about a layer, and the text by name, hash and length."""
    source, recipe = odd("qwen2_moe", torch.bfloat16, tokenizer=True), recipe_on(words, fit="router")
    report = patch_checkpoint(source, tmp_path / "out", recipe)
    text = text_for(recipe, read_config(source), AutoTokenizer.from_pretrained(source))
    assert report.run["calibration"] == {"name": "words.txt", "sha256": text.sha256, "tokens": TOKENS}
    assert json.loads((tmp_path / "out" / "namex/report.json").read_text()) == json.loads(report.to_json())
    statistics = load_file(tmp_path / "out" / "namex/statistics.safetensors")
    assert sorted(statistics) == sorted(f"layers.{n}.{what}" for n in (0, 2, 3) for what in ("cosines", "usage"))
    for record in report.layers:
        assert sorted(index for group in record["groups"] for index in group) == list(range(7))
        assert sum(record["usage"]) == 3 * TOKENS
        assert statistics[f"layers.{record['layer']}.usage"].tolist() == record["usage"]
        assert statistics[f"layers.{record['layer']}.cosines"].shape == (1, 7, 7)
        merged = [group for group in record["groups"] if len(group) > 1]
        assert sorted({tuple(sorted(game["members"])) for game in record["games"]}) == sorted(map(tuple, merged))
        assert [one["stage"] for one in record["errors"]] == ["merged", "router", "down", "router", "down"]
        first, *_, last = [one["error"] for one in record["errors"]]
        assert 0 < last < 0.8 * first
        assert len(record["fits"]) == 2
        assert all(fit["after"] <= fit["before"] and fit["steps"] <= 30 for fit in record["fits"])
        assert record["fits"][0]["after"] < 0.9 * record["fits"][0]["before"]
        assert record["seconds"] > 0
        assert record["bytes"] == 7 * 3 * 16 * 8 * 2


def test_no_file_of_the_result_holds_the_path_of_the_text(odd, words: Path, tmp_path: Path) -> None:
    source, hidden = odd("deepseek", torch.bfloat16, tokenizer=True), tmp_path / "here-and-nowhere-else"
    hidden.mkdir()
    (hidden / "it's: mine.txt").write_bytes(words.read_bytes())
    patch_checkpoint(source, tmp_path / "out", recipe_on(hidden / "it's: mine.txt", fit="router"))
    for name, (data, _) in all_files(tmp_path / "out").items():
        assert b"here-and-nowhere-else" not in data, name
        assert str(tmp_path).encode() not in data, name
    assert read_config(tmp_path / "out")["namex"]["calibration_data"] == "it's: mine.txt"
    assert Recipe.from_yaml(tmp_path / "out" / "namex/recipe.yaml").calibration.data == "it's: mine.txt"


@pytest.mark.parametrize("family", FAMILIES)
def test_all_experts_kept_is_the_identity(odd, words: Path, tmp_path: Path, family: str) -> None:
    """``experts: N``: every tensor byte for byte, from either layout and on both paths."""
    for source in (odd(family, torch.bfloat16, tokenizer=True), odd(family, torch.bfloat16, tokenizer=True, fuse=True)):
        out, recipe = tmp_path / source.parent.name, recipe_on(words, experts=7, fit="router")
        report = patch_checkpoint(source, out, recipe)
        assert differing(read_tensors(odd(family, torch.bfloat16, tokenizer=True)), read_tensors(out)) == []
        assert differing(load(source).state_dict(), live(source, recipe).state_dict()) == []
        assert all(layer["games"] == [] and sum(layer["usage"]) == 3 * TOKENS for layer in report.layers)


PLAIN = """
import sys
import weakref
sys.modules["namex_hf"] = None  # whoever imports it gets an ImportError
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert type(model).__module__.startswith("transformers.models.qwen2_moe"), type(model)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    for parameter in model.parameters():  # out of the mapped file: kernels round by how memory is aligned
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        torch.save(model.eval()(torch.load(sys.argv[1])).logits, folder + "/logits.pt")
"""


def test_plain_transformers_opens_the_result(odd, words: Path, tmp_path: Path) -> None:
    """In a process without this package; it says bit for bit what the model patched in memory says."""
    wanted: dict[str, torch.Tensor] = {}
    for family, (experts, fit) in product(("qwen2_moe", "deepseek"), ((4, "layer"), (1, "router"))):
        source, recipe = odd(family, torch.float32, tokenizer=True), recipe_on(words, experts=experts, fit=fit)
        out, export = tmp_path / f"{family}-{experts}", "qwen2_moe" if family == "deepseek" else None
        patch_checkpoint(source, out, recipe, export_as=export, shard_size="20KB")
        assert not list(out.glob("*.py"))
        assert "auto_map" not in read_config(out)
        wanted[str(out)] = logits(live(source, recipe))
    torch.save(PROBE, tmp_path / "probe.pt")
    command = [sys.executable, "-I", "-c", PLAIN, str(tmp_path / "probe.pt"), *wanted]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for folder, values in wanted.items():
        assert same_bits(torch.load(f"{folder}/logits.pt"), values), folder


def test_progress_names_layer_and_stage(odd, words: Path, tmp_path: Path) -> None:
    """Long layers are followed stage by stage; bytes grow to those of the model."""
    told: list[tuple[str, int, int]] = []
    source = odd("qwen2_moe", torch.bfloat16, tokenizer=True)

    def note(event: ProgressEvent) -> None:
        told.append((str(event), event.done, event.total))

    patch_checkpoint(source, tmp_path / "out", recipe_on(words, fit="router"), progress=note)
    stages = ["read", "merged", "router", "down", "router", "down"]
    wanted = [line for n in (0, 2, 3) for line in (*(f"layer {n}: {stage}" for stage in stages), f"layer {n}")]
    assert [what for what, _, _ in told if what != "checking"] == wanted
    assert told[0][0] == "checking"
    done = [done for _, done, _ in told]
    assert done == sorted(done)
    assert told[-1][1] == told[-1][2] == sum(tensor.nbytes for tensor in read_tensors(source).values())


def test_text_that_cannot_be_had(odd, words: Path, tmp_path: Path) -> None:
    source, few = odd("qwen2_moe", torch.bfloat16, tokenizer=True), tmp_path / "few.txt"
    few.write_text(" ".join(f"w{n}" for n in range(3, 50)))
    fit = {"fit": "router"}
    for family in FAMILIES:
        bare = odd(family, torch.bfloat16)
        refused(bare, tmp_path / "out", recipe_on(words, **fit), CalibrationError, "model has no tokenizer, and this")
    refused(source, tmp_path / "out", recipe_on(tmp_path / "no.txt", **fit), CalibrationError, "no such file or folder")
    refused(source, tmp_path / "out", recipe_on(few, **fit), CalibrationError, "48 tokens of text; a sequence needs 64")
    one = recipe_on(words, calibration_tokens=100, **fit)
    refused(source, tmp_path / "out", one, CalibrationError, "1 sequences, and no file or data set has two")
    with pytest.raises(CalibrationError, match="patch_model needs tokenizer="):
        patch_model(load(source), recipe_on(words, **fit))


def test_models_that_the_text_does_not_fit(odd, words: Path, tmp_path: Path) -> None:
    """Found when the model is built or the text embedded: the folder that was begun goes again."""
    small = odd("deepseek", torch.bfloat16, tokenizer=True, vocab_size=30)
    refused(small, tmp_path / "out", recipe_on(words, fit="router"), CheckpointError, "makes the vocabulary 30")
    strange = odd("qwen2_moe", torch.bfloat16, tokenizer=True, hidden_act="strange")
    refused(
        strange,
        tmp_path / "out",
        recipe_on(words, fit="router"),
        FamilyError,
        "no model of type 'qwen2_moe' can be built of it",
    )


@pytest.mark.parametrize("experts", [3, 7])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damage(odd, words: Path, tmp_path: Path, experts: int, value: float) -> None:
    """Also in the last layer, when others are finished; and in an expert that no token reaches, or that is kept."""
    lot = random.Random(f"{experts} {value}")
    for name in (
        f"model.layers.3.mlp.experts.{lot.randrange(7)}.down_proj.weight",
        f"model.layers.2.mlp.experts.{lot.randrange(7)}.up_proj.weight",
        "model.layers.2.mlp.gate.weight",
        "model.norm.weight",
    ):
        folder = tmp_path / name
        folder.mkdir()
        for path in odd("deepseek", torch.float32, shards=1, tokenizer=True).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        rewrite_tensors(folder, lambda tensors, name=name: tensors[name][1].fill_(value))  # type: ignore[misc]
        recipe = recipe_on(words, experts=experts, fit="router")
        refused(folder, tmp_path / "out", recipe, CheckpointError, f"tensor {name} in model.safetensors holds NaN")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("routing", ["linear", "cosine"])
def test_a_layer_s_fit_takes_the_shared_expert_along(
    odd, words: Path, tmp_path: Path, family: str, routing: str
) -> None:
    """Its matrices and its gate, and nothing beyond the mixture; what it moved by is in the record's error, and heard
    by the layers above, as transformers sees it. No other fit changes anything but routed experts and router."""
    source = odd(family, torch.float32, tokenizer=True)
    before, config = read_tensors(source), read_config(source)
    how = {"routing": routing, "error_weights": "sequence"}
    recipe = recipe_on(words, fit="layer", **how)
    report = patch_checkpoint(source, tmp_path / "layer", recipe)
    patch_checkpoint(source, tmp_path / "router", recipe_on(words, fit="router", **how))
    changed = {fit: read_tensors(tmp_path / fit) for fit in ("layer", "router")}
    for fit, after in changed.items():
        kept = {name for name in before if ".mlp.experts." not in name and not name.endswith(".mlp.gate.weight")}
        others = {name for name in kept if not same_bits(after[name], before[name])}
        of_shared = {name for name in kept if f".mlp.{shared_name(config)}" in name}
        assert others == (of_shared if fit == "layer" else set())
    ids = text_for(recipe, config, AutoTokenizer.from_pretrained(source)).ids
    original, patched = load(source), load(tmp_path / "layer")
    for record in report.layers:
        inputs = block_inputs(patched, record["layer"], ids)
        wanted, index, _ = block_output(original, record["layer"], inputs)
        usage = [int((index == expert).sum()) for expert in range(7)]
        assert sum(abs(one - other) for one, other in zip(record["usage"], usage, strict=True)) <= 4  # ties
        if routing != "linear":  # the error is that of the linear router that the cosine one is made of
            continue
        with torch.no_grad():
            found, whole = (model.model.layers[record["layer"]].mlp(inputs) for model in (patched, original))
        relative = (found - whole).square().sum((1, 2)) / wanted.square().sum((1, 2))
        assert record["errors"][-1]["error"] == pytest.approx(float(relative.mean()), rel=2e-3)


def test_the_source_s_experts_are_gone_when_a_layer_is_fitted(
    odd, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are the largest part of what a layer takes."""
    alive: list[weakref.ref[torch.Tensor]] = []
    read, fit, fits = checkpoint_source.read_experts, rewriting.fit_layer, []

    def watched(*given: Any) -> dict[str, torch.Tensor]:
        experts = read(*given)
        alive.extend(map(weakref.ref, experts.values()))
        return experts

    def spy(*given: Any) -> Any:
        fits.append([one for one in alive if one() is not None])
        return fit(*given)

    monkeypatch.setattr(checkpoint_source, "read_experts", watched)
    monkeypatch.setattr(rewriting, "fit_layer", spy)
    source = odd("qwen2_moe", torch.bfloat16, tokenizer=True)
    patch_checkpoint(source, tmp_path / "out", recipe_on(words, fit="layer"))
    assert len(alive) == 9
    assert fits == [[], [], []]
