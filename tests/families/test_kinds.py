"""Kinds of parameters, told from names, against the modules that hold them."""

from collections.abc import Iterator
from typing import Any

import pytest
from safetensors import safe_open
from torch import nn
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from namex_hf.families.kinds import KINDS, PATTERNS, kind_of
from namex_hf.models.routers import CosineRouter
from namex_hf.models.soft_kronecker import KroneckerCurvature
from namex_hf.recipe import Recipe
from namex_hf.training.start import start_from
from tests.helpers.toy_models import save_toy

MODELS = ("tiny", "tiny-deepseek")
STOCK = {"attention", "embeddings", "experts", "norms", "router", "shared"}
RECIPES = {
    "stock": (Recipe(method="smoe"), set()),
    "residual": (Recipe(), {"base"}),
    "soft": (Recipe(merge="soft", curvature="kronecker"), {"base", "curvature"}),
    "smear": (Recipe(merge="soft", method="smear", curvature="kronecker"), {"curvature"}),
    "cosine": (Recipe(routing="cosine"), {"base"}),
    "stable": (Recipe(routing="stable"), {"base"}),
    "grouped": (Recipe(merge="grouped", experts=4), set()),
}


def by_module(model: Any) -> Iterator[tuple[nn.Parameter, str]]:
    """Every parameter with its kind, from where it is and not from what it is called."""
    yield from ((one, "embeddings") for one in model.get_input_embeddings().parameters())
    yield from ((one, "embeddings") for one in model.get_output_embeddings().parameters())
    yield from ((one, "norms") for one in model.model.norm.parameters())
    for layer in model.model.layers:
        yield from ((one, "attention") for one in layer.self_attn.parameters())
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            yield from ((one, "norms") for one in norm.parameters())
        mixture = hasattr(layer.mlp, "experts")
        for part in layer.mlp.children():
            yield from ((one, in_block(layer.mlp, part) if mixture else "dense") for one in part.parameters())


def in_block(block: Any, part: nn.Module) -> str:
    if isinstance(part, Qwen2MoeExperts):
        return "experts"
    if part is block.gate or isinstance(part, CosineRouter):
        return "router"
    if isinstance(part, KroneckerCurvature):
        return "curvature"
    return "base" if part is getattr(block, "base_expert", None) else "shared"


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_the_packaged_models(name: str, recipe: str):
    chosen, more = RECIPES[recipe]
    model = start_from(name, recipe=chosen).outline()
    expected = {id(parameter): kind for parameter, kind in by_module(model)}
    found = {id(parameter): kind_of(name) for name, parameter in model.named_parameters()}
    assert found == expected
    assert set(found.values()) == STOCK | more | ({"dense"} if name == "tiny-deepseek" else set())


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek"])
def test_names_in_the_hubs_layout_and_an_untied_head(family: str, tmp_path):
    """Files hold experts one by one; a kind is that of the tensor that they become a part of."""
    with safe_open(save_toy(tmp_path / "toy", family) / "model.safetensors", "pt") as file:
        names = list(file.keys())
    experts = [name for name in names if ".experts." in name]
    assert len(experts) >= 2 * 8 * 3
    assert {kind_of(name) for name in experts} == {"experts"}
    assert {kind_of(name) for name in names} == STOCK | ({"dense"} if family == "deepseek" else set())
    assert kind_of("lm_head.weight") == kind_of("model.embed_tokens.weight") == "embeddings"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod.base_model.model."])
def test_wrappers_around_a_model_change_no_kind(prefix: str):
    names = [name for name, _ in start_from("tiny-deepseek").outline().named_parameters()]
    assert [kind_of(prefix + name) for name in names] == [kind_of(name) for name in names]


@pytest.mark.parametrize("name", ["tokens", "model.layers.0.mlp.weight", "student.experts", "model.layers.0.mlp"])
def test_a_name_of_no_kind_is_refused(name: str):
    with pytest.raises(ValueError, match=f"^parameter {name} is of no known kind; accepted: experts, base, "):
        kind_of(name)


def test_every_kind_has_a_pattern():
    assert list(KINDS) == list(PATTERNS)
