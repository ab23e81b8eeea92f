"""Quantised folders against transformers' own model, and their bytes against a live model's parameters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from namex_hf.checkpoint.source import open_checkpoint
from namex_hf.errors import CheckpointError
from namex_hf.evaluation.loading import load
from namex_hf.merging.experts import ExpertWeights
from namex_hf.quantising.folder import write_quantised
from namex_hf.quantising.grid import rounded_to_nearest
from namex_hf.quantising.layers import quantised_expert
from namex_hf.quantising.matrices import DENSE, matrices_of
from tests.helpers.checkpoints import read_tensors, write_folder
from tests.helpers.toy_models import FAMILIES, save_toy, toy_config, toy_tensors

DENSE_NAMES = ("_proj.weight",)


def quantised(folder: Path, out: Path, bits: int, ids: torch.Tensor | None = None) -> Any:
    write_quantised(matrices_of(open_checkpoint(folder)), out, bits, ids)
    return load(out)


def is_dense(name: str) -> bool:
    """A linear module of a decoder layer, by its name in the class; experts are stacked, gates have other names."""
    return name.endswith(DENSE_NAMES) and ".layers." in name


def is_routed(name: str) -> bool:
    return ".mlp.experts." in name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fuse", [False, True])
def test_rounded_to_nearest(tmp_path: Path, family: str, fuse: bool):
    folder = save_toy(tmp_path / "toy", family, fuse=fuse)
    before, after = load(folder).state_dict(), quantised(folder, tmp_path / "out", 3).state_dict()
    assert before.keys() == after.keys()
    count = {"dense": 0, "routed": 0}
    for name, tensor in before.items():
        expected = tensor
        if is_dense(name):
            expected, count["dense"] = rounded_to_nearest(tensor, DENSE), count["dense"] + 1
        elif is_routed(name):
            each = [rounded_to_nearest(matrix, 3) for matrix in tensor]
            expected, count["routed"] = torch.stack(each), count["routed"] + 1
        assert torch.equal(after[name], expected.bfloat16().float()), name
    assert min(count.values()) > 2


def test_text_goes_through_the_layers_as_they_are_quantised(tmp_path: Path):
    """Every expert is what GPTQ makes of the tokens that transformers' own model, quantised below, sends to it."""
    folder = save_toy(tmp_path / "toy")
    ids = torch.randint(3, 11, (6, 40), generator=torch.Generator().manual_seed(0))  # few words: inputs go together
    found = quantised(folder, tmp_path / "out", 3, ids).state_dict()
    model = load(folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if is_dense(name):
                weight.copy_(rounded_to_nearest(weight, DENSE).bfloat16())
        for layer in model.model.layers:
            experts, given = layer.mlp.experts, []
            hook = experts.register_forward_pre_hook(lambda _, inputs, given=given: given.append(inputs))
            model(ids)
            hook.remove()
            inputs, index, _ = given[0]
            for number in range(8):
                gate, up = experts.gate_up_proj[number].chunk(2)
                one = ExpertWeights(gate, up, experts.down_proj[number])
                new = quantised_expert(one, inputs[(index == number).any(1)], nn.functional.silu, 3)
                experts.gate_up_proj[number] = torch.cat([new.gate, new.up]).bfloat16()
                experts.down_proj[number] = new.down.bfloat16()
    for name, expected in model.state_dict().items():
        # Numbers half-way between two levels may go the other way.
        same = torch.isclose(found[name], expected, rtol=1e-2, atol=1e-6).float().mean()
        assert same > 0.995, name
    rounded = quantised(folder, tmp_path / "rounded", 3).state_dict()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.isclose(found[name], rounded[name]).float().mean() < 0.9


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_of_a_model(tmp_path: Path, family: str):
    """Hidden 16 and width 8: a group is a row of 16, or of 8."""
    folder = save_toy(tmp_path / "toy", family)
    weights = dict(load(folder).named_parameters())
    routed = sum(w.numel() for name, w in weights.items() if is_routed(name))
    dense = [w for name, w in weights.items() if is_dense(name)]
    found = matrices_of(open_checkpoint(folder)).storage(4)
    assert (found.routed, found.dense) == (routed, sum(w.numel() for w in dense))
    rows_of_16, rows_of_8 = routed * 2 // 3 // 16, routed // 3 // 8
    assert found.routed_bits == 4 * routed + (rows_of_16 + rows_of_8) * (16 + 4)
    groups = {w: w.shape[1] // 16 if w.shape[1] % 16 == 0 else 1 for w in dense}
    assert found.dense_bits == sum(8 * w.numel() + w.shape[0] * count * 24 for w, count in groups.items())
    others = sum(w.numel() for name, w in weights.items() if not is_dense(name) and not is_routed(name))
    assert found.other_bytes == 2 * others
    assert found.bytes == (found.routed_bits + found.dense_bits) / 8 + 2 * others
    assert found.unquantised.bytes == 2 * sum(w.numel() for w in weights.values())


@pytest.mark.parametrize("text", [False, True])
def test_a_number_that_is_none(tmp_path: Path, text: bool):
    config = toy_config("qwen2_moe")
    tensors = toy_tensors(config, torch.bfloat16)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[name][0, 0] = float("nan")
    folder = save_toy(tmp_path / "toy")
    write_folder(folder, config, tensors)
    ids = torch.randint(3, 256, (2, 40)) if text else None
    with pytest.raises(CheckpointError, match=f"tensor {name} in model.safetensors holds NaN or infinite values"):
        quantised(folder, tmp_path / "out", 4, ids)


def test_names_and_dtypes_of_files_are_the_source_s(tmp_path: Path):
    config = toy_config("qwen2_moe", torch.float16)
    folder = write_folder(tmp_path / "toy", config, toy_tensors(config, torch.float16), shards=3)
    quantised(folder, tmp_path / "out", 4)
    before, after = read_tensors(folder), read_tensors(tmp_path / "out")
    assert {name: (t.dtype, t.shape) for name, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
