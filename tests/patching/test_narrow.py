"""``merge: narrow`` as stock checkpoints: what changes in the files, and that programs open the same function."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from namex_hf import Recipe, patch_checkpoint
from namex_hf.checkpoint.resolve import resolve
from namex_hf.errors import CalibrationError, CheckpointError
from namex_hf.patching.estimate import MARGIN, space_needed
from namex_hf.patching.plan import make_plan
from tests.helpers.checkpoints import (
    PROJECTIONS,
    differing,
    moe_layers,
    read_config,
    read_tensors,
    rewrite_tensors,
    same_bits,
    shared_name,
    write_folder,
)
from tests.helpers.recipes import NARROW, WIDE, recipe_of
from tests.helpers.runs import load, logits
from tests.helpers.toy_models import FAMILIES, add_tokenizer

WIDTH, DTYPE = NARROW["width"], torch.float32
FORMS = pytest.mark.parametrize("family", FAMILIES)


def patched(source: Path, out: Path, words: Path, **fields: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """The report, and which neurons stayed, by layer."""
    report = patch_checkpoint(source, out, recipe_of(words, {**NARROW, **fields}))
    statistics = load_file(out / "namex/statistics.safetensors")
    stay = {name.split(".")[1]: kept for name, kept in statistics.items() if name.endswith(".neurons")}
    return report, stay


@FORMS
@pytest.mark.parametrize("neurons", ["second_order", "energy", "random"])
def test_what_stays_is_the_sources_bit_for_bit(odd, words: Path, tmp_path: Path, family: str, neurons: str) -> None:
    """All but the routed experts and DeepSeek's shared ones; of experts the gates and ups that the record names."""
    source = odd(family, torch.bfloat16, tokenizer=True, **WIDE)
    _, stay = patched(source, tmp_path / "out", words, neurons=neurons)
    before, after = read_tensors(source), read_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    inside = (".experts.", ".shared_experts.") if family == "deepseek" else (".experts.",)
    rest = [name for name in before if not any(part in name for part in inside)]
    assert differing(*({name: tensors[name] for name in rest} for tensors in (before, after))) == []
    for layer in moe_layers(read_config(source)):
        assert stay[str(layer)].shape == (7, WIDTH)
        for expert, kept in enumerate(stay[str(layer)].long()):
            gate, up, down = (f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight" for name in PROJECTIONS)
            assert same_bits(after[gate], before[gate][kept])
            assert same_bits(after[up], before[up][kept])
            assert after[down].shape == (16, WIDTH)


def with_zeros(source: Path, out: Path, stay: dict[str, torch.Tensor], folder: Path) -> Path:
    """The original, at its width, with the result's downs where neurons stayed and zeros where they went."""
    tensors, after = read_tensors(source), read_tensors(out)
    for layer, experts in stay.items():
        for expert, kept in enumerate(experts.long()):
            name = f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"
            wide = torch.zeros_like(tensors[name])
            wide[:, kept] = after[name]
            tensors[name] = wide
    return write_folder(folder, read_config(source), tensors)


@FORMS
def test_the_function_is_that_of_zeros_in_the_original(odd, words: Path, tmp_path: Path, family: str) -> None:
    """Through transformers' own classes. DeepSeek's shared expert of 72 neurons has become 80, five times the width;
    the eight more change nothing.
    """
    source = odd(family, DTYPE, tokenizer=True, **WIDE)
    _, stay = patched(source, tmp_path / "out", words)
    narrow = load(tmp_path / "out")
    wide = load(with_zeros(source, tmp_path / "out", stay, tmp_path / "wide"))
    np.testing.assert_allclose(logits(narrow), logits(wide), rtol=1e-4, atol=1e-5)
    assert float((logits(wide) - logits(load(source))).abs().max()) > 1e-2
    before, after = read_tensors(source), read_tensors(tmp_path / "out")
    grows = {"deepseek": 8, "qwen2_moe": 0}[family]
    for layer in moe_layers(read_config(source)):
        for projection in PROJECTIONS:
            name = f"model.layers.{layer}.mlp.{shared_name(read_config(source))}.{projection}.weight"
            old, new = ((t.T if projection == "down_proj" else t) for t in (before[name], after[name]))
            assert same_bits(new[: len(old)], old)
            assert new[len(old) :].shape == (grows, 16)
            assert not new[len(old) :].any()


def test_a_width_that_divides_adds_nothing(odd, words: Path, tmp_path: Path) -> None:
    """72 is nine times 8."""
    source = odd("deepseek", DTYPE, tokenizer=True, **WIDE)
    patched(source, tmp_path / "out", words, width=8)
    config = read_config(tmp_path / "out")
    assert (config["moe_intermediate_size"], config["n_shared_experts"]) == (8, 9)
    before, after = (
        {n: t for n, t in read_tensors(f).items() if ".shared_experts." in n} for f in (source, tmp_path / "out")
    )
    assert differing(before, after) == []


def test_a_single_sequence_is_enough_without_a_fit(odd, words: Path, tmp_path: Path) -> None:
    """Nothing is chosen on text that was held back; a fit needs some."""
    source = odd("qwen2_moe", DTYPE, tokenizer=True, **WIDE)
    one = tmp_path / "one.npy"
    np.save(one, np.arange(64, dtype=np.int32) % 50)
    fields = {"calibration_data": str(one), "calibration_tokens": 64}
    report, _ = patched(source, tmp_path / "out", words, **fields)
    assert report.run["calibration"]["tokens"] == 64
    with pytest.raises(CalibrationError, match="so none can be held back"):
        patched(source, tmp_path / "fitted", words, fit="layer", **fields)


@FORMS
def test_a_fit_makes_the_error_smaller(odd, words: Path, tmp_path: Path, family: str) -> None:
    """The zeros of a shared expert come after the fit and stay zeros."""
    source = odd(family, DTYPE, tokenizer=True, **WIDE)
    report, _ = patched(source, tmp_path / "out", words, fit="layer", fit_steps=50, calibration_tokens=4096)
    for record in report.layers:
        assert [one["stage"] for one in record["errors"]] == ["narrowed", "layer"]
        assert record["errors"][1]["error"] <= record["errors"][0]["error"]
    assert sum(one["errors"][1]["error"] for one in report.layers) < sum(
        one["errors"][0]["error"] for one in report.layers
    )
    if family == "deepseek":
        after = read_tensors(tmp_path / "out")
        for layer in moe_layers(read_config(source)):
            assert not after[f"model.layers.{layer}.mlp.shared_experts.up_proj.weight"][72:].any()


@FORMS
def test_room_on_the_disk_is_enough(odd, words: Path, tmp_path: Path, family: str) -> None:
    """What a run keeps besides the result until it ends: its layers, and the text."""
    source = odd(family, torch.bfloat16, tokenizer=True, **WIDE)
    plan = make_plan(resolve(str(source)), recipe_of(words, NARROW), "5GB")
    layers = sum(t.nbytes for n, t in patched_tensors(source, tmp_path / "out", words).items() if "expert" in n)
    assert space_needed(plan) >= plan.bytes_out + layers + 2 * 4 * 1024 * 16
    assert space_needed(plan) <= plan.bytes_out + 2 * layers + 4 * 4 * 1024 * 16 + MARGIN


def patched_tensors(source: Path, out: Path, words: Path) -> dict[str, torch.Tensor]:
    patched(source, out, words)
    return read_tensors(out)


def test_damage_names_tensor_and_file(odd, words: Path, tmp_path: Path) -> None:
    source = write_folder(
        tmp_path / "in", read_config(odd("qwen2_moe", DTYPE, **WIDE)), read_tensors(odd("qwen2_moe", DTYPE, **WIDE))
    )
    add_tokenizer(source)
    name = "model.layers.2.mlp.experts.3.up_proj.weight"

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][0, 0] = float("nan")

    rewrite_tensors(source, damage)
    with pytest.raises(CheckpointError, match=rf"tensor {name} in .*safetensors holds NaN"):
        patch_checkpoint(source, tmp_path / "out", recipe_of(words, NARROW))


def test_a_recipe_that_a_run_stored_reads_the_same(odd, words: Path, tmp_path: Path) -> None:
    source = odd("qwen2_moe", DTYPE, tokenizer=True, **WIDE)
    patched(source, tmp_path / "out", words, neurons="energy")
    stored = Recipe.from_stored(read_config(tmp_path / "out")["namex"]).to_dict()
    assert (stored["merge"], stored["width"], stored["neurons"]) == ("narrow", WIDTH, "energy")
