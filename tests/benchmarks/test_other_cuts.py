"""What ``benchmarks/other_cuts.py`` emulates, beside the package's own cut."""

import copy

import pytest
import torch
from other_cuts import elimination_order, emulated, layers_on_text, merged, remaining_neurons

from namex_hf import Recipe, patch_model
from namex_hf.merging.neurons import neurons_that_stay
from tests.helpers.toy_models import toy_model, toy_tokenizer

IDS = torch.arange(64).view(2, 32)


@pytest.fixture(scope="module")
def recipe():
    return Recipe(keep=0.5, sweeps=0, calibration_tokens=4096, device="cpu")


@pytest.fixture(scope="module")
def model():
    return toy_model()


@pytest.fixture(scope="module")
def layers(model, recipe):
    with torch.no_grad():
        return layers_on_text(model, recipe, toy_tokenizer())


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@torch.no_grad()
def test_equal_numbers_are_the_cut_of_the_package(model, recipe, layers):
    narrow = logits(patch_model(copy.deepcopy(model), recipe, toy_tokenizer()))
    assert (narrow - logits(model)).abs().max() > 1e-3
    assert torch.allclose(logits(emulated(model, layers, joint=False, span="expert")), narrow, atol=1e-4)


@torch.no_grad()
def test_nothing_merged_is_a_cut(model, layers):
    cut = logits(emulated(model, layers, joint=False, span="expert"))
    assert torch.allclose(logits(merged(model, layers, alike=1.0)), cut, atol=1e-4)


def test_an_expert_alone_chooses_as_in_the_package(layers):
    layer = next(iter(layers.values()))
    order, losses = elimination_order(layer, joint=False, least=0)
    assert len(order) == len(losses) == len(layer.together)
    mine = (layer.expert == 0).nonzero().flatten()
    own = [one for one in order.tolist() if one in mine]
    for width in (1, 4, 7):
        chosen = neurons_that_stay(layer.together[mine][:, mine], layer.down[:, mine], width, "second_order")
        assert sorted(own[-width:]) == mine[chosen].tolist()


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("span", ["expert", "layer", "model"])
def test_half_of_the_neurons_stay(layers, joint, span):
    kept = remaining_neurons(layers, joint, span)
    numbers = torch.stack([layers[n].expert[stay].bincount(minlength=8) for n, stay in kept.items()])
    assert numbers.sum() == len(layers) * 8 * 4
    assert span == "model" or (numbers.sum(1) == 8 * 4).all()
    assert span != "expert" or (numbers == 4).all()


@torch.no_grad()
def test_a_joint_refit_is_nearer_to_the_output(model, layers):
    number, layer = next(iter(layers.items()))
    joint = emulated(model, {number: layer}, joint=True, span="expert")
    alone = emulated(model, {number: layer}, joint=False, span="expert")
    assert missed(joint, number, layer) < missed(alone, number, layer)


def down_of(model, number):
    return model.get_submodule(f"model.layers.{number}.mlp.experts").down_proj.permute(1, 0, 2).flatten(1)


def missed(model, number, layer):
    """The squared error of the layer's routed output, and what the ridge adds."""
    change = layer.down - down_of(model, number)
    return (change.double() @ layer.together * change).sum()
