"""Live models: gradients against an unrolled walk, against finite differences; against the stored model they become."""

import copy
import gc
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState

from namex_hf import Recipe, load_patched, patch_model
from namex_hf.checkpoint.resolve import PACKAGED
from namex_hf.errors import TrainingError
from namex_hf.training.bargain import BargainCallback, rebargain, summary
from namex_hf.training.gathered import experts_of, write_base
from namex_hf.training.live import go_live, moe_blocks, refresh, settle, write_bases
from tests.helpers.toy_models import toy_model

SIZES = {
    "vocab_size": 41,
    "pad_token_id": None,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "num_hidden_layers": 4,
}
OWN = {"qwen2_moe": {"mlp_only_layers": [2]}, "deepseek": {}}
"""With a dense layer that the base has to pass by."""
MOMENTUM: dict[str, dict[str, Any]] = {
    "none": {},
    "real": {"momentum": "complex", "beta": "0.9"},
    "complex": {"momentum": "complex", "beta": "0.9,0.2618"},
    "quaternion": {"momentum": "quaternion", "gamma": 0.2},
}
QUATERNIONS = {
    "none": (0, 0, 0, 0),
    "real": (0.9, 0, 0, 0),
    "complex": (0.9 * math.cos(0.2618), 0.9 * math.sin(0.2618), 0, 0),
    "quaternion": (0.8, 0.3, 0.3, 0.3),
}
MERGES: dict[str, dict[str, Any]] = {
    "residual": {},
    "token": {"merge": "soft"},
    "segment": {"merge": "soft", "segment": 8},
}
PARTS = ("gate_proj", "up_proj", "down_proj")
over_forms = [
    pytest.mark.parametrize("family", OWN),
    pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES),
]


def over_all_forms(test):
    for mark in over_forms:
        test = mark(test)
    return test


def patched(family: str, dtype: torch.dtype = torch.float32, **recipe: Any) -> Any:
    """Random, the same at every call, and as if it had been trained since it was patched."""
    model = toy_model(family, dtype, **{**SIZES, **OWN[family]})
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # the others know narrower dtypes alone
    return shaken(patch_model(model, Recipe(**{"gamma": 0.6, **recipe})))


@torch.no_grad()
def shaken(model: Any, what: str = "mlp.", size: float = 0.1) -> Any:
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if what in name and parameter.requires_grad:
            parameter += size * torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
    return model


def tokens(length: int = 24) -> torch.Tensor:
    return torch.randint(0, 41, (2, length), generator=torch.Generator().manual_seed(2))


def loss_of(model: Any, **options: Any) -> torch.Tensor:
    return model(tokens(), labels=tokens(), use_cache=False, **options).loss


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(), use_cache=False).logits


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def times(left: tuple, right: tuple) -> tuple:
    """Hamilton's product; the left one's parts are numbers, the right one's tensors."""
    a, b, c, d = left
    w, x, y, z = right
    return (
        a * w - b * x - c * y - d * z,
        a * x + b * w + c * z - d * y,
        a * y - b * z + c * w + d * x,
        a * z + b * y - c * x + d * w,
    )


def bent(block: Any, part: str, number: int, tau: torch.Tensor) -> torch.Tensor:
    """``M_i(tau_i)``, the sum of ``(A1 x A2) tau (B1 x B2)^T``, in full matrices."""
    factors = getattr(block.curvature, part)
    products = zip(
        factors.left_outer[number],
        factors.left_inner[number],
        factors.right_outer[number],
        factors.right_inner[number],
        strict=True,
    )
    return sum(torch.kron(a1, a2) @ tau @ torch.kron(b1, b2).T for a1, a2, b1, b2 in products)


def unrolled(model: Any, gamma: float, beta: tuple, curved: bool = False) -> dict[str, torch.Tensor]:
    """Bases of all later layers as functions of the parameters, by name: eq. 11 as written, mu a quaternion; `curved`:
    eq. 3 with its M_i."""
    numbers = [number for number, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    found = {}
    for index, part in enumerate(PARTS):
        base = getattr(model.model.layers[numbers[0]].mlp.base_expert, part).weight
        momentum = (torch.zeros_like(base),) * 4
        for number in numbers[:-1]:
            block = model.model.layers[number].mlp
            width = block.experts.down_proj.shape[-1]
            both = block.experts.gate_up_proj
            experts = {"gate_proj": both[:, :width], "up_proj": both[:, width:], "down_proj": block.experts.down_proj}
            delta = sum(
                float(weight) * (bent(block, part, number, expert - base) if curved else expert - base)
                for number, (weight, expert) in enumerate(zip(block.weights[index], experts[part], strict=True))
            )
            momentum = times(beta, momentum)
            momentum = (momentum[0] + delta, *momentum[1:])
            base = base + gamma * momentum[0]
            found[f"model.layers.{numbers[numbers.index(number) + 1]}.mlp.base_expert.{part}.weight"] = base
    return found


@over_all_forms
@pytest.mark.parametrize("momentum", MOMENTUM)
def test_gradients_are_those_of_the_walk_unrolled(family, merge, momentum):
    """The stored model's own forward, called with bases that a plain loop has made of the live model's parameters."""
    recipe = {"gamma": 0.6, **merge, **MOMENTUM[momentum]}
    live = go_live(patched(family, torch.float64, **recipe))
    found = gradients(live)
    live.zero_grad()
    bases = unrolled(live, recipe["gamma"], QUATERNIONS[momentum])
    stored = settle(copy.deepcopy(live))
    leaves = dict(live.named_parameters())
    labels = {"labels": tokens(), "use_cache": False}
    torch.func.functional_call(stored, {**leaves, **bases}, (tokens(),), labels).loss.backward()
    wanted = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert found.keys() == wanted.keys()
    assert not any("base_expert" in name for name in found if name not in first_base_of(live))
    for name, gradient in wanted.items():
        assert gradient.any()
        assert apart(found[name], gradient) < 1e-6, name


CURVED = {"merge": "soft", "segment": 8, "curvature": "kronecker", "rank": 2}


@pytest.mark.parametrize(
    ("family", "method", "momentum"),
    [
        ("qwen2_moe", "ep-camex", "none"),
        ("deepseek", "ep-camex", "complex"),
        ("qwen2_moe", "namex-full", "none"),
        ("deepseek", "namex", "none"),
    ],
)
def test_curvature_acts_in_the_propagation_of_ep_camex_alone(family, method, momentum):
    """Logits and gradients of a plain loop over eq. 3, M_i in full matrices; NAMEx has no M_i there (eq. 7)."""
    curved = method == "ep-camex"
    live = go_live(patched(family, torch.float64, **CURVED, **MOMENTUM[momentum], method=method))
    found, logits = gradients(live), logits_of(live)
    live.zero_grad()
    loop = [unrolled(live, 0.6, QUATERNIONS[momentum], curved=how) for how in (curved, not curved)]
    stored = settle(copy.deepcopy(live))
    leaves, given = dict(live.named_parameters()), (tokens(),)
    same, other = (torch.func.functional_call(stored, {**leaves, **one}, given, {"use_cache": False}) for one in loop)
    torch.testing.assert_close(logits, same.logits.detach(), rtol=1e-9, atol=1e-9)
    assert apart(other.logits.detach(), logits) > 1e-3
    stored.loss_function(same.logits, tokens(), vocab_size=41).backward()
    wanted = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.any()
        assert apart(found[name], gradient) < 1e-6, name


def test_curved_propagation_under_checkpointing_and_autocast():
    """Nothing but the experts' arithmetic is in 16 bits, and what is computed again is the same."""
    live = go_live(patched("qwen2_moe", **CURVED, method="ep-camex")).train()
    wanted = gradients(live)
    live.activation_checkpointing_enable()
    found = gradients(live)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6)
    stored = settle(copy.deepcopy(live))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logits_of(live), logits_of(stored))


def first_base_of(model: Any) -> list[str]:
    blocks = moe_blocks(model)
    number = next(n for n, layer in enumerate(model.model.layers) if layer.mlp is blocks[0])
    return [f"model.layers.{number}.mlp.base_expert.{part}.weight" for part in PARTS]


@over_all_forms
def test_gradients_are_finite_differences_of_the_loss(family, merge):
    """Along one direction in the first base and the experts, a random one on the gradient's side: norms and softmax
    work in float32, which a step has to outweigh. Few tokens, so that none comes near another choice of experts."""
    live = go_live(patched(family, torch.float64, momentum="complex", **merge))
    leaves = dict(live.named_parameters())
    given = tokens(10)
    moved = [name for name in leaves if "mlp.experts" in name or name in first_base_of(live)]

    def loss() -> torch.Tensor:
        logits = live(given, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), given[:, 1:].flatten())

    found = torch.autograd.grad(loss(), [leaves[name] for name in moved])
    torch.manual_seed(3)
    along = [gradient * torch.rand_like(gradient) for gradient in found]
    length = sum(direction.square().sum() for direction in along).sqrt()
    step, losses = 1e-3 / length, []
    for sign in (1, -2):
        with torch.no_grad():
            for name, direction in zip(moved, along, strict=True):
                leaves[name] += sign * step * direction
            losses.append(loss())
    wanted = sum((gradient * direction).sum() for gradient, direction in zip(found, along, strict=True))
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(wanted), rel=5e-4)


@pytest.mark.parametrize(("gamma", "reaches"), [(1.0, False), (0.6, True)])
def test_at_gamma_one_the_first_base_gets_what_its_own_layer_gives_it(gamma, reaches):
    live = go_live(patched("qwen2_moe", torch.float64, gamma=gamma))
    stored = settle(copy.deepcopy(live))
    of_live, of_stored = gradients(live), gradients(stored)
    for name in first_base_of(live):
        assert (apart(of_live[name], of_stored[name]) > 0.01) == reaches
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    assert apart(of_live[experts], of_stored[experts]) > 1e-3  # whatever gamma is, later bases are made of them
    assert len(of_stored) - len(of_live) == 3 * 2  # each later base has its own gradient, where bases are stored


@over_all_forms
def test_a_live_model_is_the_stored_one_that_it_becomes(family, merge):
    recipe = {**merge, "momentum": "complex", "beta": "0.9,0.2618"}
    model = patched(family, **recipe)
    kinds = [type(module) for module in model.modules()]
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    wrapped = set(model._no_split_modules)
    live = go_live(model)
    shaken(live, "experts")  # with the weights of before: nothing is solved for again
    shaken(live, "base_expert")
    found = logits_of(live)
    stored = settle(copy.deepcopy(live))
    torch.testing.assert_close(logits_of(stored), found, rtol=1e-6, atol=1e-6)
    assert [type(module) for module in stored.modules()] == kinds
    assert {name: p.requires_grad for name, p in stored.named_parameters()} == trained
    assert stored._no_split_modules == stored.model._no_split_modules == wrapped != live._no_split_modules
    refresh(live)
    assert (logits_of(live) - found).abs().max() > 1e-4
    rebargain(stored, Recipe.from_dict(stored.config.namex))
    torch.testing.assert_close(logits_of(stored), logits_of(live), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["tiny", "tiny-deepseek"])
def test_a_packaged_model_goes_live_without_a_change(name):
    model = AutoModelForCausalLM.from_pretrained(PACKAGED / name, dtype=torch.float32)
    patch_model(model, Recipe(gamma=0.6))
    before = logits_of(model)
    assert torch.equal(logits_of(go_live(model)), before)


@over_all_forms
def test_what_is_saved_is_a_patched_folder(family, merge, tmp_path):
    live = shaken(go_live(patched(family, momentum="complex", **merge)), "experts")
    live.save_pretrained(tmp_path / "live")
    loaded = load_patched(tmp_path / "live", dtype=torch.float32)
    torch.testing.assert_close(logits_of(loaded), logits_of(live), rtol=1e-6, atol=1e-6)
    stored = settle(live)
    stored.save_pretrained(tmp_path / "stored")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "live" / file).read_bytes() == (tmp_path / "stored" / file).read_bytes()


@over_all_forms
def test_gradient_checkpointing_changes_nothing(family, merge):
    live = go_live(patched(family, momentum="complex", beta="0.9,0.2618", **merge)).train()
    wanted = gradients(live)
    live.activation_checkpointing_enable()
    found = gradients(live)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-7)


def test_reentrant_checkpointing_is_refused():
    live = go_live(patched("qwen2_moe")).train()
    live.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(TrainingError, match="use_reentrant is true"):
        loss_of(live)


def bases_among(things: list) -> set[int]:
    """Where in memory tensors of the shape of a base expert's matrices are."""
    found = [thing for thing in things if type(thing) is torch.Tensor and sorted(thing.shape) == [8, 16]]
    return {tensor.untyped_storage().data_ptr() for tensor in found}


@pytest.mark.parametrize(
    ("momentum", "buffers"), [("none", 0), ("real", 1), ("complex", 2), ("quaternion", 2)], ids=str
)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_autograd_keeps_as_many_bases_as_is_said(momentum, buffers, checkpointing):
    """One a layer after the first; under checkpointing what layers are called with, so the momentum, too."""
    live = go_live(patched("deepseek", **MOMENTUM[momentum])).train()
    kept: list[torch.Tensor] = []
    gc.collect()  # else the memory of what earlier tests left may be a base's in a moment
    before = bases_among([*gc.get_objects(), *(parameter.detach() for parameter in live.parameters())])
    if checkpointing:
        live.activation_checkpointing_enable()
        loss = loss_of(live)
        kept = gc.get_objects()  # by functions that compute again
    else:
        with torch.autograd.graph.saved_tensors_hooks(lambda found: kept.append(found) or found, lambda found: found):
            loss = loss_of(live)
    bases = bases_among(kept) - before
    copies = 1 + buffers if checkpointing else 1
    assert len(bases) == 3 * copies * (len(moe_blocks(live)) - 1)
    loss.backward()


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_in_bfloat16_and_under_autocast(merge):
    """The walk is in float32 in both; a base is rounded where it is used, as the stored one is."""
    live = go_live(patched("qwen2_moe", torch.bfloat16, **merge))
    assert torch.equal(logits_of(live), logits_of(settle(copy.deepcopy(live))))
    live = go_live(patched("qwen2_moe", **merge))
    stored = settle(copy.deepcopy(live))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logits_of(live), logits_of(stored))
        found, wanted = gradients(live), gradients(stored)
    assert found.keys() < wanted.keys()


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_outputs_are_recorded_and_text_is_continued_as_from_a_stored_model(merge):
    live = go_live(patched("qwen2_moe", **merge)).eval()
    stored = settle(copy.deepcopy(live))
    recorded = [model(tokens(), output_hidden_states=True, output_router_logits=True) for model in (live, stored)]
    for name in ("hidden_states", "router_logits"):
        for found, wanted in zip(*(output[name] for output in recorded), strict=True):
            torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(recorded[0].aux_loss, recorded[1].aux_loss)
    texts = [model.generate(tokens(10), max_new_tokens=20, do_sample=False, pad_token_id=0) for model in (live, stored)]
    assert torch.equal(*texts)
    assert torch.equal(texts[0], live.generate(tokens(10), max_new_tokens=20, use_cache=False, pad_token_id=0))


RECIPES = {
    "NAMEx-Full": {},
    "every second": {"every": 2},
    "NAMEx": {"method": "namex"},
    "EP-CAMEx": {"method": "ep-camex"},
    "whole experts": {"granularity": "expert"},
    "raw weights": {"scale": "lemma", "gamma": 0.05},
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_weights_are_those_of_the_bargain_at_every_nth_step(recipe):
    live = go_live(patched("deepseek", **recipe)).train()
    callback = BargainCallback(Recipe.from_dict(live.config.namex), every=3)
    optimizer = torch.optim.SGD(live.parameters(), lr=0.3)
    blocks = moe_blocks(live)
    for step in range(1, 7):
        before = [block.weights.clone() for block in blocks]
        gradients(live)
        optimizer.step()
        callback.on_step_end(None, TrainerState(global_step=step), TrainerControl(), model=live)
        after = [block.weights for block in blocks]
        same = all(map(torch.equal, before, after))
        assert same == (step % 3 != 0 or recipe.get("method") == "ep-camex")
        if step % 3 == 0:
            assert callback.state["bargain/drift"] > 0  # how far the walk has come since the last time
    wanted = rebargain(settle(copy.deepcopy(live)), callback.recipe)
    for block, layer in zip(blocks, wanted, strict=True):
        assert block.weights.tolist() == [game["weights"] for game in layer.record]
    if recipe.get("every") == 2:
        assert torch.equal(blocks[0].weights, blocks[1].weights)
        assert not torch.equal(blocks[1].weights, blocks[2].weights)
    if recipe.get("method") == "namex":
        assert torch.equal(blocks[0].weights, blocks[2].weights)
    assert summary(wanted)["bargain/no_agreement"] == 0


@pytest.mark.parametrize(
    ("point", "weight", "status"), [("zero", 0, "no_agreement"), ("mean", 1 / 8, "uniform_fallback")]
)
def test_a_layer_without_agreement_is_passed_by_its_rule(point, weight, status):
    """NAMEx around the mean of the first layer's experts: its weights are in force there and are not reused."""
    model = patched("qwen2_moe", method="namex", disagreement=point)
    first = moe_blocks(model)[0]
    write_base(first, {name: matrices.mean(0) for name, matrices in experts_of(first).items()})
    live = go_live(model)
    blocks = moe_blocks(live)
    assert torch.equal(blocks[0].weights, torch.full((3, 8), weight, dtype=torch.float64))
    assert blocks[1].weights.std() > 0
    assert torch.equal(blocks[2].weights, blocks[1].weights)
    found = summary(refresh(live))
    assert {name: found[name] for name in ("bargain/no_agreement", "bargain/uniform_fallback")} == {
        "bargain/no_agreement": 0.0,
        "bargain/uniform_fallback": 0.0,
        f"bargain/{status}": pytest.approx(1 / len(blocks)),
    }
    bases = unrolled(live, 0.6, QUATERNIONS["none"])
    write_bases(live)
    for name, base in bases.items():
        torch.testing.assert_close(live.get_parameter(name), base)


def test_optimisers_see_one_base_and_leave_the_others_alone():
    live = go_live(patched("qwen2_moe")).train()
    frozen = {name for name, p in live.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in live.named_parameters() if "base_expert" in name} - set(first_base_of(live))
    optimizer = torch.optim.AdamW(live.parameters(), lr=1e-2, weight_decay=0.1)
    before, losses = copy.deepcopy(dict(live.named_parameters())), []
    for _ in range(5):
        gradients(live)
        losses.append(loss_of(live).item())
        optimizer.step()
    assert losses[-1] < losses[0]
    for name, parameter in live.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in frozen)


@pytest.mark.parametrize("first", [True, False], ids=["live, then LoRA", "LoRA, then live"])
def test_what_lora_adds_to_experts_walks_along(first):
    """The logits are those of the merged model, and gradients are what its experts' are along the factors."""
    model = patched("qwen2_moe", torch.float64)
    if first:
        go_live(model)
    adapter = LoraConfig(
        r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    torch.manual_seed(0)
    adapted = get_peft_model(model, adapter)
    if not first:
        go_live(model)
    shaken(adapted, "lora_B", 0.3)
    refresh(adapted)
    merged = copy.deepcopy(adapted).merge_and_unload()
    torch.testing.assert_close(logits_of(merged), logits_of(adapted), rtol=1e-5, atol=1e-5)
    loss_of(adapted).backward()
    for name, parameter in merged.named_parameters():
        parameter.requires_grad_("mlp.experts" in name)
    of_merged = gradients(merged)
    wrappers = {name: module for name, module in adapted.named_modules() if hasattr(module, "parameter_name")}
    assert len(wrappers) == len(of_merged) == 2 * len(moe_blocks(model))
    for name, wrapper in wrappers.items():
        block = name.removeprefix("base_model.model.").partition(".experts")[0]
        factors = [factor for part, factor in wrapper.named_parameters() if part.startswith("lora_")][:2]
        found = [factor.grad for factor in factors]
        along = of_merged[f"{block}.experts.{wrapper.parameter_name}"]
        wanted = torch.autograd.grad((wrapper.get_delta_weight("default") * along).sum(), factors)
        for gradient, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-8)


def test_what_has_no_walking_base_is_refused():
    def stock() -> Any:
        return toy_model("qwen2_moe", **SIZES)

    with pytest.raises(TrainingError, match="Qwen2MoeForCausalLM is not patched"):
        go_live(stock())
    with pytest.raises(TrainingError, match="under merge 'residual', method 'camex'"):
        go_live(patch_model(stock(), Recipe(method="camex")))
    with pytest.raises(TrainingError, match="under merge 'soft', method 'smear'"):
        go_live(patch_model(stock(), Recipe(merge="soft", method="smear")))
    live = go_live(patched("qwen2_moe"))
    with pytest.raises(TrainingError, match="found a LiveQwen2MoeDecoderLayer; accepted: a patched layer"):
        go_live(live)
    stored = settle(live)
    with pytest.raises(TrainingError, match="found a NamexQwen2MoeDecoderLayer; accepted: a live layer"):
        settle(stored)


def test_diverged_experts_are_said_and_nothing_is_changed():
    model = patched("qwen2_moe")
    with torch.no_grad():
        moe_blocks(model)[1].experts.down_proj[5, 0, 0] = math.nan
    with pytest.raises(TrainingError, match="layer 1, expert 5: down_proj"):
        go_live(model)
    assert all("Live" not in type(module).__name__ for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_on_meta_has_a_state_dict():
    """accelerate takes one of a model that it has moved there; there are no bases to write."""
    live = go_live(patched("qwen2_moe"))
    names = list(live.state_dict())
    assert list(live.to("meta").state_dict()) == names


def test_bases_are_written_by_hand_too():
    live = shaken(go_live(patched("qwen2_moe")), "experts")
    stale = moe_blocks(live)[1].base_expert.up_proj.weight.clone()
    write_bases(live)
    assert not torch.equal(moe_blocks(live)[1].base_expert.up_proj.weight, stale)
    torch.testing.assert_close(logits_of(settle(copy.deepcopy(live))), logits_of(live))
