"""What a patched folder holds: unchanged bytes, complete index, and a model equal to the one patched in memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from namex_hf import Recipe, load_patched, patch_checkpoint
from tests.helpers.checkpoints import (
    INDEX,
    aligned,
    all_files,
    differing,
    read_config,
    read_tensors,
    same_bits,
    write_folder,
)
from tests.helpers.toy_models import VOCAB, fused, odd_config, toy_tensors

TOKENS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def load(folder: Path) -> Any:
    """As a user does, with nothing missing and nothing left over."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return aligned(model)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_residual_adds_and_changes_nothing(odd, tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    """Every tensor of the source is there, byte for byte, from either layout; only base experts are new."""
    source, same = odd(family, dtype), odd(family, dtype, fuse=True, shards=2)
    patch_checkpoint(source, tmp_path / "one")
    patch_checkpoint(same, tmp_path / "other")
    before, after = read_tensors(source), read_tensors(tmp_path / "one")
    added = {name for name in after if ".base_expert." in name}
    assert after.keys() == before.keys() | added
    assert differing(before, {name: after[name] for name in before}) == []
    assert differing(after, read_tensors(tmp_path / "other")) == []
    assert not any(name.endswith("gate_up_proj") for name in after)


def test_index_counts_every_byte(odd, tmp_path: Path) -> None:
    """``total_size`` is the bytes of the tensors, in every form of the result; shards bear transformers' names."""
    recipes: list[tuple[str, Recipe, dict[str, Any]]] = [
        ("qwen2_moe", Recipe(), {}),
        ("deepseek", Recipe(merge="grouped", experts=3), {"shard_size": 6000}),
        ("deepseek", Recipe(merge="grouped", experts=3), {"shard_size": 6000, "export_as": "qwen2_moe"}),
        ("qwen2_moe", Recipe(method="smoe"), {}),
    ]
    for number, (family, recipe, options) in enumerate(recipes):
        out = tmp_path / str(number)
        patch_checkpoint(odd(family, torch.bfloat16), out, recipe, **options)
        tensors = read_tensors(out)
        index = json.loads((out / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
        count = len(set(index["weight_map"].values()))
        names = [f"model-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)]
        assert sorted(path.name for path in out.glob("*.safetensors") if path.name.startswith("model")) == names


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek"])
def test_smoe_is_the_original(odd, tmp_path: Path, family: str) -> None:
    """Nothing merged: the tensors and the logits of the original, in its own class."""
    source = odd(family, torch.bfloat16, fuse=True)
    patch_checkpoint(source, tmp_path / "out", Recipe(method="smoe"))
    assert differing(read_tensors(odd(family, torch.bfloat16)), read_tensors(tmp_path / "out")) == []
    assert read_config(tmp_path / "out")["model_type"] == family
    original = load(source)
    assert type(load(tmp_path / "out")) is type(original)
    assert same_bits(logits(load(tmp_path / "out")), logits(original))


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek"])
def test_residual_speaks_differently(odd, tmp_path: Path, family: str) -> None:
    """The base expert is heard: a patch that changed nothing would pass every equality above."""
    source = odd(family, torch.float32)
    patch_checkpoint(source, tmp_path / "out")
    assert (logits(load_patched(tmp_path / "out", dtype="auto")) - logits(load(source))).abs().max() > 1e-3


def test_companions(odd, tmp_path: Path) -> None:
    """Tokenizer and generation files go along; code of others, and pointers to it, do not."""
    source = odd("deepseek", torch.bfloat16, tokenizer=True)
    before = all_files(source)
    patch_checkpoint(source, tmp_path / "out")
    assert all_files(source) == before
    out = set(all_files(tmp_path / "out"))
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"} <= out
    assert {"config.json", "namex/recipe.yaml", "namex/report.json", "namex/statistics.safetensors"} <= out
    assert not any(name.endswith(".part") or name in (".namex", "tokenization.py") for name in out)
    assert "auto_map" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "somebody/else" not in (tmp_path / "out" / "config.json").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w5 w7")["input_ids"] == [5, 7]
    assert Recipe.from_yaml(tmp_path / "out" / "namex/recipe.yaml") == Recipe()


def test_nothing_stored_names_a_local_path(odd, tmp_path: Path) -> None:
    """The files of a result say what it was made of by name and hash alone."""
    source = odd("qwen2_moe", torch.bfloat16)
    patch_checkpoint(source, tmp_path / "out")
    for name, (data, _) in all_files(tmp_path / "out").items():
        assert str(source.parent).encode() not in data, name
        assert str(tmp_path).encode() not in data, name


def test_without_shared_dtype(tmp_path: Path) -> None:
    """Tensors of other dtypes than the experts' are carried over as they are, fused or not."""
    config = odd_config("qwen2_moe", torch.bfloat16)
    tensors = toy_tensors(config, torch.bfloat16)
    tensors = {n: t.float() if "norm" in n or "mlp.gate." in n else t for n, t in tensors.items()}
    patch_checkpoint(write_folder(tmp_path / "one", config, tensors, 2), tmp_path / "a")
    patch_checkpoint(write_folder(tmp_path / "two", config, fused(config, tensors)), tmp_path / "b")
    written = read_tensors(tmp_path / "a")
    assert differing(tensors, {name: written[name] for name in tensors}) == []
    assert differing(written, read_tensors(tmp_path / "b")) == []
    patch_checkpoint(tmp_path / "two", tmp_path / "c", Recipe(merge="grouped", experts=3))
    assert read_tensors(tmp_path / "c")["model.layers.0.mlp.gate.weight"].dtype == torch.float32
