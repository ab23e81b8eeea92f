"""``first_layer: sparse`` on both paths: the first MoE layer stores nothing more, the base walks on from it all the
same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from namex_hf import Recipe, patch_checkpoint
from namex_hf.checkpoint.resolve import resolve
from namex_hf.errors import RecipeError
from namex_hf.patching.plan import make_plan
from namex_hf.progress import ProgressEvent
from tests.helpers.checkpoints import (
    PROJECTIONS,
    differing,
    moe_layers,
    read_config,
    read_tensors,
    same_bits,
    settled_files,
)
from tests.helpers.runs import live, load, logits

PLAIN: list[tuple[str, dict[str, Any]]] = [
    ("qwen2_moe", {}),
    ("deepseek", {"momentum": "complex", "base": "first", "gamma": 0.5}),
    ("deepseek", {"merge": "soft", "curvature": "kronecker", "rank": 1}),
    ("qwen2_moe", {"method": "camex", "routing": "cosine"}),
    ("deepseek", {"merge": "soft", "method": "smear", "routing": "cosine"}),
]
ON_TEXT: list[tuple[str, dict[str, Any]]] = [
    ("qwen2_moe", {"merge": "soft", "segment": 4, "curvature": "calibrated", "rank": 2, "gamma": 0.5}),
    ("deepseek", {"merge": "soft", "align": "activations"}),
    ("deepseek", {"merge": "soft", "segment": 4, "routing": "stable", "top_k": 1}),
    ("qwen2_moe", {"routing": "stable"}),
]
ADDED = (".base_expert.", ".curvature.", ".cosine_router.", ".stable_router.")


def recipes(words: Path, **fields: Any) -> tuple[Recipe, Recipe]:
    """With the first layer sparse, and merged."""
    if Recipe(**fields).needs_text:
        fields |= {"calibration_data": str(words), "calibration_tokens": 1024}
    return Recipe(first_layer="sparse", **fields), Recipe(**fields)


@pytest.mark.parametrize(("family", "fields"), PLAIN + ON_TEXT, ids=str)
def test_both_paths_agree_and_the_base_walks_from_the_first_layer(
    odd, words: Path, tmp_path: Path, family: str, fields: dict[str, Any]
) -> None:
    source = odd(family, torch.float32, tokenizer=True)
    sparse, merged = recipes(words, **fields)
    patch_checkpoint(source, tmp_path / "sparse", sparse)
    stored, patched = load(tmp_path / "sparse"), live(source, sparse)
    assert [type(layer.mlp) for layer in stored.model.layers] == [type(layer.mlp) for layer in patched.model.layers]
    assert differing(stored.state_dict(), patched.state_dict()) == []
    assert same_bits(logits(stored), logits(patched))

    patch_checkpoint(source, tmp_path / "merged", merged)
    one, other = read_tensors(tmp_path / "sparse"), read_tensors(tmp_path / "merged")
    first, second = (f"model.layers.{layer}.mlp" for layer in moe_layers(read_config(source))[:2])
    gone = other.keys() - one.keys()
    assert gone == {name for name in other if name.startswith((f"{first}.base_expert.", f"{first}.curvature."))}
    assert one.keys() == other.keys() - gone
    if sparse.merge.has_base:
        assert len(gone) >= len(PROJECTIONS)
        for name in PROJECTIONS:
            base = f"{second}.base_expert.{name}.weight"
            assert torch.equal(one[base], other[base])
    if not sparse.needs_text:
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    if sparse.routing.kind == "stable":
        tables = [tensor.shape[1] for name, tensor in sorted(one.items()) if ".assignment" in name]
        top_k = read_config(source)["num_experts_per_tok"]
        assert tables == [top_k] + [sparse.to_dict()["top_k"] or top_k] * (len(tables) - 1)

    plan = make_plan(resolve(str(source)), sparse, "5GB")
    assert plan.bytes_out == sum(tensor.nbytes for tensor in one.values())
    for layer in plan.shape.layers:
        added = [t for n, t in one.items() if n.startswith(f"model.layers.{layer}.") and any(a in n for a in ADDED)]
        assert plan.added_bytes(layer) == sum(tensor.nbytes for tensor in added)


class Broken(Exception):
    pass


@pytest.mark.parametrize("fields", [PLAIN[1][1], ON_TEXT[0][1]], ids=["without text", "on text"])
def test_a_run_that_broke_off_goes_on(odd, words: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    """The base that the first layer gives is in the state folder, not in the result: byte for byte as undisturbed."""
    source, (recipe, _) = odd("deepseek", torch.bfloat16, tokenizer=True, num_hidden_layers=5), recipes(words, **fields)
    patch_checkpoint(source, tmp_path / "undisturbed", recipe, shard_size="4KB")

    def stop(event: ProgressEvent) -> None:
        if str(event) == "layer 2":
            raise Broken

    with pytest.raises(Broken):
        patch_checkpoint(source, tmp_path / "out", recipe, shard_size="4KB", progress=stop)
    told: list[str] = []
    patch_checkpoint(source, tmp_path / "out", recipe, shard_size="4KB", progress=lambda event: told.append(str(event)))
    assert "layer 3" in told
    assert settled_files(tmp_path / "out") == settled_files(tmp_path / "undisturbed")
    layers = json.loads((tmp_path / "out" / "namex" / "report.json").read_text())["layers"]
    assert [len(layer["games"]) for layer in layers] == [3] * 4


def test_a_model_of_one_mixture_is_refused(odd, tmp_path: Path) -> None:
    source = odd("deepseek", torch.float32, num_hidden_layers=2)
    with pytest.raises(RecipeError, match="'first_layer' is 'sparse'; this model has one MoE layer"):
        patch_checkpoint(source, tmp_path / "out", Recipe(first_layer="sparse"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fields", [{"method": "smoe"}, {"merge": "grouped", "experts": 4}], ids=str)
def test_it_belongs_to_a_merge_in_the_block(fields: dict[str, Any]) -> None:
    with pytest.raises(
        RecipeError, match="'first_layer' belongs to merge 'residual' or 'soft' and a method that merges"
    ):
        Recipe(first_layer="sparse", **fields)
