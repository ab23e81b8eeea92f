"""What ``benchmarks/other_cuts.py`` emulates, beside the package's own cut."""

import copy

import pytest
import torch
from other_cuts import elimination_order, emulated, halved, layers_on_text, merged, of_halves, remaining_neurons

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


@torch.no_grad()
def test_all_halves_are_the_layer(model, layers):
    for layer in layers.values():
        source, inputs = layer.mixture, layer.text.inputs
        target = source.output(inputs, layer.text.routing)
        whole, expert, remaining = halved(layer, 2 * source.gate.top_k, 2 * source.experts.count)
        assert torch.allclose(whole.output(inputs, whole.route(inputs)), target, atol=1e-5)
        assert expert.tolist() == [one // 2 for one in range(2 * source.experts.count)]
        assert (remaining.view(source.experts.count, -1).sort(1).values == torch.arange(8)).all()


@torch.no_grad()
def test_half_of_the_halves(model, layers):
    """The same function as the refitted layer, in the model; the refit brings it nearer to the source's."""
    number, layer = next(iter(layers.items()))
    source, inputs = layer.mixture, layer.text.inputs
    target = source.output(inputs, layer.text.routing)
    new = of_halves(model, {number: layer}, 4)
    block = new.get_submodule(f"model.layers.{number}.mlp")
    _, value, index = block.gate(inputs)
    output = block.experts(inputs, index, value)
    before, _, _ = halved(layer, 4, source.experts.count)
    missed_before = (before.output(inputs, before.route(inputs)) - target).square().sum()
    assert (output - target).square().sum() < missed_before
    assert (down_of(new, number).view(-1, 8, 8).count_nonzero(2) == 4).all()
    assert index.shape[1] == 4


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
