"""The bargain in training: the walk through experts as they are, and the callback that makes it."""

import copy
import math

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState

from namex_hf import Recipe, patch_model
from namex_hf.checkpoint.resolve import PACKAGED
from namex_hf.errors import TrainingError
from namex_hf.training.bargain import BargainCallback, distance, rebargain, summary
from namex_hf.training.choice import lora
from namex_hf.training.fold import fold_curvature
from namex_hf.training.gathered import base_of, experts_of
from namex_hf.training.live import go_live
from namex_hf.training.plan import Choice, plan_training
from namex_hf.training.start import start_from

RECIPES = {
    "residual": Recipe(),
    "soft": Recipe(merge="soft"),
    "ep-camex": Recipe(method="ep-camex"),
    "namex": Recipe(method="namex"),
    "every second": Recipe(every=2),
    "momentum": Recipe(momentum="complex", beta="0.9,0.2618"),
    "whole experts": Recipe(granularity="expert", gamma=0.5),
}
MODELS = ("tiny", "tiny-deepseek")


def stock(name: str = "tiny"):
    return AutoModelForCausalLM.from_pretrained(PACKAGED / name, dtype=torch.float32)


def layers_of(model) -> list:
    return [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "base_expert")]


def bases(model) -> list[dict[str, torch.Tensor]]:
    return [base_of(block) for block in layers_of(model)]


@torch.no_grad()
def shaken(model, what: str = "mlp.experts.", size: float = 0.01):
    """As if it had been trained."""
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if what in name:
            parameter += size * torch.randn(parameter.shape, generator=draw)
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_on_an_untrained_model_nothing_moves(name, recipe):
    model = patch_model(stock(name), recipe)
    before = bases(model)
    settled = rebargain(model, recipe)
    assert [layer.drift for layer in settled] == [None, *[0.0] * (len(before) - 1)]
    for one, other in zip(before, bases(model), strict=True):
        assert all(torch.equal(one[part], other[part]) for part in one)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_after_training_bases_are_those_of_a_fresh_patch(name, recipe):
    """Experts moved first and patched then, or patched first and moved then, give the same bases."""
    wanted = patch_model(shaken(stock(name)), recipe)
    model = shaken(patch_model(stock(name), recipe))
    assert any(distance(a, b) > 1e-3 for a, b in zip(bases(model), bases(wanted), strict=True))
    rebargain(model, recipe)
    for one, other in zip(bases(model), bases(wanted), strict=True):
        assert all(torch.equal(one[part], other[part]) for part in one)


def test_the_walk_begins_with_the_first_base_as_trained():
    recipe = Recipe(gamma=0.5)  # with 1 the next base is the weighted mean of the experts, wherever it came from
    model = patch_model(stock(), recipe)
    shaken(model, "layers.0.mlp.base_expert", 0.1)
    first, second = bases(model)[:2]
    settled = rebargain(model, recipe)
    found = bases(model)
    assert all(torch.equal(first[part], found[0][part]) for part in first)
    assert distance(second, found[1]) > 0.01
    assert settled[1].drift == pytest.approx(distance(second, found[1]), rel=1e-5)


def test_the_step_is_the_paper_s():
    """E_m' = E_m + sum a_i (E_i - E_m), the weights those that are reported."""
    model = shaken(patch_model(stock(), Recipe()))
    block = layers_of(model)[0]
    experts, base = experts_of(block), base_of(block)
    record = rebargain(model, Recipe())[0].record
    after = bases(model)[1]
    for game in record:
        (part,) = game["projections"]
        weights = torch.tensor(game["weights"], dtype=torch.float64)
        tau = experts[part].double() - base[part].double()
        wanted = base[part].double() + (weights[:, None, None] * tau).sum(0)
        torch.testing.assert_close(after[part].double(), wanted, atol=1e-6, rtol=1e-5)


def test_the_step_of_ep_camex_has_the_trained_curvature():
    """E_m' = E_m + 1/N sum M_i(tau_i) (eq. 3), M_i in full matrices, whose order is that of the rows and columns."""
    recipe = Recipe(merge="soft", method="ep-camex", curvature="kronecker", gamma=0.5)
    model = shaken(patch_model(stock(), recipe), "curvature", 0.2)
    experts, base, block = experts_of(layers_of(model)[0]), base_of(layers_of(model)[0]), layers_of(model)[0]
    rebargain(model, recipe)
    after = bases(model)[1]
    for part in experts:
        own = [factor.detach().double()[:, 0] for factor in getattr(block.curvature, part).parameters()]
        tau = experts[part].double() - base[part].double()
        moved = sum(
            torch.kron(a1, a2) @ one @ torch.kron(b1, b2).T for one, a1, a2, b1, b2 in zip(tau, *own, strict=True)
        )
        wanted = base[part].double() + 0.5 / len(tau) * moved
        torch.testing.assert_close(after[part].double(), wanted, atol=1e-6, rtol=1e-5)
        assert (wanted - base[part] - 0.5 * tau.mean(0)).abs().max() > 1e-3
    fold_curvature(model)  # then M_i(tau_i) are the domain vectors
    assert max(layer.drift for layer in rebargain(model, Recipe.from_dict(model.config.namex))[1:]) < 1e-6


def test_drift_is_what_gradients_made_of_a_base():
    model = patch_model(stock(), Recipe())
    with torch.no_grad():
        for part in ("gate_proj", "up_proj", "down_proj"):
            getattr(layers_of(model)[2].base_expert, part).weight *= 1.25
    drifts = [layer.drift for layer in rebargain(model, Recipe())]
    assert drifts[2] == pytest.approx(0.25, rel=1e-5)
    assert drifts[0] is None
    assert drifts[1] == drifts[3] == 0.0


def test_without_writing_the_games_are_played_around_the_bases_as_they_are():
    model = shaken(shaken(patch_model(stock(), Recipe())), "base_expert", 0.1)
    before = bases(model)
    settled = rebargain(model, Recipe(), write=False)
    assert all(layer.drift is None for layer in settled)
    for layer, block, base in zip(settled, layers_of(model), before, strict=True):
        tau = experts_of(block)["up_proj"].flatten(1).double() - base["up_proj"].flatten().double()
        up = next(game for game in layer.record if game["projections"] == ["up_proj"])
        assert up["norms"] == pytest.approx(tau.norm(dim=1).tolist(), rel=1e-4)
    for one, other in zip(before, bases(model), strict=True):
        assert all(torch.equal(one[part], other[part]) for part in one)


def test_camex_keeps_every_base():
    recipe = Recipe(method="camex", base="mean")
    model = shaken(patch_model(stock(), recipe))
    before = bases(model)
    settled = rebargain(model, recipe)
    assert all(layer.drift is None for layer in settled)
    assert {game["status"] for layer in settled for game in layer.record} == {"own_base"}
    assert "bargain/drift" not in summary(settled)
    for one, other in zip(before, bases(model), strict=True):
        assert all(torch.equal(one[part], other[part]) for part in one)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fields", [{}, {"merge": "soft", "method": "ep-camex", "curvature": "kronecker"}], ids=str)
@pytest.mark.parametrize("base", ["shared", "mean"])
def test_where_the_first_layer_is_sparse_the_walk_begins_with_its_parameters_as_they_are(name, fields, base):
    """Bases are those of a fresh patch of the trained original; the first layer keeps its own tensors alone."""
    recipe = Recipe(first_layer="sparse", gamma=0.5, base=base, **fields)

    def trained(model):
        return shaken(shaken(model), "mlp.shared_expert")

    wanted, model = patch_model(trained(stock(name)), recipe), trained(patch_model(stock(name), recipe))
    pairs = [
        (one, other)
        for one, other in zip(layers_of(model), layers_of(wanted), strict=True)
        if one.base_expert is not None
    ]
    assert len(pairs) == len(layers_of(model)) - 1
    assert distance(base_of(pairs[0][0]), base_of(pairs[0][1])) > 1e-3
    first = {part: tensor.clone() for part, tensor in layers_of(model)[0].state_dict().items()}
    settled = rebargain(model, recipe)
    assert settled[0].drift is None
    assert all(layer.drift > 0 for layer in settled[1:])
    assert all(distance(base_of(one), base_of(other)) <= (1e-6 if fields else 0) for one, other in pairs)
    assert all(torch.equal(tensor, first[part]) for part, tensor in layers_of(model)[0].state_dict().items())
    around = rebargain(model, recipe, write=False)
    assert [layer.record[0]["weights"] for layer in around[:2]] == [layer.record[0]["weights"] for layer in settled[:2]]


def test_a_live_base_needs_one_in_the_first_layer():
    recipe = Recipe(first_layer="sparse")
    says = "'first_layer' is 'sparse': a live base begins as a parameter of the first MoE layer; accepted: merged"
    with pytest.raises(TrainingError, match=says):
        go_live(patch_model(stock(), recipe))
    choice = Choice(("experts",), None, 10, (), {}, live=True)
    with pytest.raises(TrainingError, match=says):
        plan_training(start_from("tiny", recipe=recipe), choice)


def test_what_lora_adds_to_experts_counts():
    """The bases under an adapter are those of the merged model, and travel in the adapter."""
    recipe = Recipe()
    model = patch_model(stock(), recipe)
    torch.manual_seed(0)
    adapted = get_peft_model(model, lora(model, ("experts",), 4, 8, 0.0, carry_base=True))
    shaken(adapted, "lora_B", 0.05)
    merged = copy.deepcopy(adapted).merge_and_unload()
    plain = rebargain(patch_model(stock(), recipe), recipe)
    under, wanted = rebargain(adapted, recipe), rebargain(merged, recipe)
    assert max(layer.drift for layer in under[1:]) > 1e-3
    for one, other, without in zip(under, wanted, plain, strict=True):
        for game, like, unlike in zip(one.record, other.record, without.record, strict=True):
            assert game["norms"] == pytest.approx(like["norms"], rel=1e-5)
            assert game["norms"] != pytest.approx(unlike["norms"], rel=1e-5)
    for one, other in zip(bases(adapted.get_base_model()), bases(merged), strict=True):
        assert distance(one, other) < 1e-6
    with adapted.disable_adapter():
        off = rebargain(adapted, recipe, write=False)
    assert off[0].record[0]["norms"] == pytest.approx(plain[0].record[0]["norms"], rel=1e-5)


def test_diverged_training_is_said():
    model = patch_model(stock(), Recipe())
    with torch.no_grad():
        layers_of(model)[3].experts.down_proj[5, 0, 0] = math.nan
    with pytest.raises(TrainingError, match="layer 3, expert 5: down_proj"):
        rebargain(model, Recipe())


def test_a_layer_without_agreement_is_counted():
    """All experts alike: no domain vector points anywhere that the others could gain by."""
    model = patch_model(stock(), Recipe())
    with torch.no_grad():
        for block in layers_of(model):
            block.experts.gate_up_proj.copy_(block.experts.gate_up_proj[:1].expand_as(block.experts.gate_up_proj))
            block.base_expert.gate_proj.weight.copy_(block.experts.gate_up_proj[0, :80])
            block.base_expert.up_proj.weight.copy_(block.experts.gate_up_proj[0, 80:])
    found = summary(rebargain(model, Recipe()))
    assert 0 < found["bargain/no_agreement"] < 1


@pytest.mark.parametrize("every", [1, 3])
def test_the_callback_acts_on_every_nth_step(every):
    recipe = Recipe()
    model = shaken(patch_model(stock(), recipe))
    callback = BargainCallback(recipe, every)
    acted = []
    for step in range(1, 7):
        shaken(model, "layers.1.mlp.base_expert", 0.01)
        state = TrainerState(global_step=step)
        callback.on_step_end(None, state, TrainerControl(), model=model)
        if callback.state:
            acted.append(step)
            assert callback.state["bargain/drift"] > 0
            callback.state = {}
    assert acted == [step for step in range(1, 7) if step % every == 0]
    assert callback.seconds > 0
