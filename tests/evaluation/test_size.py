"""Active parameters, counted once more on live models."""

from pathlib import Path
from typing import Any

import pytest

from namex_hf import Recipe, patch_checkpoint
from namex_hf.checkpoint.resolve import resolve
from namex_hf.checkpoint.source import open_checkpoint
from namex_hf.evaluation.loading import load
from namex_hf.evaluation.size import size_of
from tests.helpers.toy_models import save_toy

FAMILIES = ("qwen2_moe", "deepseek")


def counted(model: Any, through: int) -> int:
    """Of a live model, whose experts are one tensor, and tied embeddings one parameter."""
    found = 0
    for name, weight in model.named_parameters():
        experts = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
        found += weight.numel() * through // len(weight) if experts else weight.numel()
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fused", [False, True])
def test_a_stock_model(tmp_path: Path, family: str, fused: bool):
    folder = save_toy(tmp_path / "toy", family, fuse=fused)
    found = size_of(open_checkpoint(folder))
    model = load(folder)
    assert (found.experts, found.active) == (8, counted(model, 3))
    assert found.bytes == 2 * counted(model, 8)
    without = size_of(open_checkpoint(folder), routed=False)
    routers = sum(w.numel() for name, w in model.named_parameters() if name.endswith("mlp.gate.weight"))
    assert (without.experts, without.active) == (0, counted(model, 0) - routers)
    assert without.bytes == 2 * without.active


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("recipe", "experts", "through", "apart"),
    [
        (Recipe(), 8, 3, ()),
        (Recipe(method="smoe", routing="cosine"), 8, 3, ()),
        (Recipe(merge="grouped", experts=5), 5, 3, ()),
        (Recipe(merge="grouped", experts=2), 2, 2, ()),
        (Recipe(merge="soft", segment=64), 8, 1, ("base_expert",)),
        (Recipe(merge="soft", segment=64, curvature="kronecker"), 8, 1, ("base_expert", "curvature")),
        (Recipe(merge="soft"), 8, 3, ()),
        (Recipe(merge="soft", top_k=2, curvature="kronecker"), 8, 2, ("curvature",)),
        (Recipe(merge="soft", method="smear"), 8, 8, ()),
    ],
)
def test_a_patched_model(
    tmp_path: Path, family: str, recipe: Recipe, experts: int, through: int, apart: tuple[str, ...]
):
    folder = save_toy(tmp_path / "toy", family)
    patch_checkpoint(folder, tmp_path / "out", recipe)
    found = size_of(resolve(tmp_path / "out"))
    model = load(tmp_path / "out")
    left_out = sum(w.numel() for name, w in model.named_parameters() if any(f"mlp.{part}." in name for part in apart))
    assert bool(left_out) == bool(apart)
    assert (found.experts, found.active) == (experts, counted(model, through) - left_out)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sparse_first_layer_is_passed_by_top_k(tmp_path: Path, family: str):
    """One expert a token in all layers but the first, where it is three."""
    folder = save_toy(tmp_path / "toy", family)
    found = {}
    for first in ("merged", "sparse"):
        patch_checkpoint(folder, tmp_path / first, Recipe(merge="soft", segment=64, first_layer=first))
        found[first] = size_of(resolve(tmp_path / first))
    model = load(folder)
    mixture = next(layer.mlp.experts for layer in model.model.layers if hasattr(layer.mlp, "experts"))
    expert = sum(weight[0].numel() for weight in mixture.parameters())
    assert found["sparse"].active == found["merged"].active + 2 * expert
    assert found["sparse"].bytes == found["merged"].bytes - 2 * expert
