"""What trains: refusals, counts, and adapters on every kind of parameters of live models of both families."""

import warnings
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file

from namex_hf.errors import TrainingError
from namex_hf.families.kinds import KINDS, kind_of
from namex_hf.models.convert import patch_classes
from namex_hf.recipe import Recipe
from namex_hf.training.choice import (
    EVERYTHING,
    FUSED,
    LINEAR,
    WHOLE,
    check_kinds,
    check_present,
    check_trains,
    counts,
    lora,
    present,
    table_of,
    train_only,
    whole_size,
)
from namex_hf.training.start import start_from
from tests.helpers.toy_models import FAMILIES, toy_model

RESIDUAL = {"merge": "residual"}
KRONECKER = {"merge": "soft", "curvature": "kronecker", "rank": 2, "segment": 4}
RECIPES: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "residual": RESIDUAL,
    "cosine": {**RESIDUAL, "routing": "cosine"},
    "stable": {**RESIDUAL, "routing": "stable"},
    "soft": KRONECKER,
    "soft-cosine": {**KRONECKER, "routing": "cosine"},
}
ADAPTED = (*FUSED, *LINEAR, *WHOLE)


MADE: dict[str, Any] = {}


def make(family: str, recipe: dict[str, Any] | None) -> Any:
    """A random model, the same at every call, of which the first is kept."""
    key = f"{family} {recipe}"
    if key not in MADE:
        MADE[key] = toy_model(family)
        if recipe is not None:
            patch_classes(MADE[key], dict(recipe))
    return deepcopy(MADE[key]).eval()


def kinds_of(family: str, recipe: str) -> tuple[str, ...]:
    """Those that an adapter can act on, of a model of this family under this recipe."""
    absent = {"dense"} if family == "qwen2_moe" else set()
    absent |= {"base"} if recipe == "stock" else set()
    absent |= set() if recipe.startswith("soft") else {"curvature"}
    return tuple(kind for kind in ADAPTED if kind not in absent)


def combinations(family: str, recipe: str) -> list[tuple[str, ...]]:
    """Each kind alone and all together; of routings that differ in their router alone, that kind and all."""
    kinds = kinds_of(family, recipe)
    alone = ["router"] if recipe in ("stable", "soft-cosine") else kinds
    return [*((kind,) for kind in alone), kinds]


COMBINATIONS = {
    f"{family}-{recipe}-{kinds[0] if len(kinds) == 1 else 'all'}": (family, recipe, kinds)
    for family in FAMILIES
    for recipe in RECIPES
    for kinds in combinations(family, recipe)
}
every_combination = pytest.mark.parametrize(("family", "recipe", "kinds"), COMBINATIONS.values(), ids=COMBINATIONS)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


def adapted(model: Any, kinds: Sequence[str], carry_base: bool = False) -> Any:
    return get_peft_model(model, lora(model, kinds, 2, 4, 0.0, carry_base))


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def move(parameters: dict[str, torch.nn.Parameter]) -> None:
    """As training would, but all at once."""
    draw = torch.Generator().manual_seed(3)
    for parameter in parameters.values():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))


# Adapters


@every_combination
def test_an_adapter_trains_what_was_named_and_nothing_else(family: str, recipe: str, kinds, ids: torch.Tensor):
    model = make(family, RECIPES[recipe])
    plain, before = logits(model, ids), counts(model)
    model = adapted(model, kinds)
    assert {kind_of(name) for name in trainable(model)} == set(kinds)
    assert torch.equal(logits(model, ids), plain)
    found = check_trains(model, kinds)
    assert {kind for kind, (some, _) in found.items() if some} == set(kinds)
    for kind, (some, every) in found.items():
        more = some if kind in kinds and kind not in WHOLE else 0  # low-rank factors stand beside what is frozen
        assert every == before[kind][1] + more
    for kind in set(WHOLE) & set(kinds):
        assert found[kind] == before[kind]
    model.train()(ids, labels=ids).loss.backward()
    for name, parameter in trainable(model).items():
        assert parameter.grad is not None, name
        if "lora_A" not in name:  # B starts at zero, and with it the gradient of A
            assert parameter.grad.abs().sum() > 0, name
    assert not any(p.grad is not None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_matrix_of_a_kind_has_its_factors(family: str, recipe: str):
    model = adapted(make(family, RECIPES[recipe]), kinds_of(family, recipe))
    found = Counter(kind_of(name) for name in trainable(model) if "lora_B" in name)
    dense = family == "deepseek"
    mixtures = 3 - dense
    a_layer = {"experts": 2, "router": 2 if "cosine" in recipe else 1, "shared": 3}
    expected = {kind: number * mixtures for kind, number in a_layer.items()} | {"attention": 3 * 4}
    assert found == expected | ({"dense": 3} if dense else {})


@every_combination
def test_an_adapter_is_loaded_and_merged_as_it_was(family: str, recipe: str, kinds, ids: torch.Tensor, tmp_path: Path):
    model = make(family, RECIPES[recipe])
    plain = logits(model, ids)
    model = adapted(model, kinds)
    move(trainable(model))
    moved = logits(model, ids)
    assert (moved - plain).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(family, RECIPES[recipe]), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, ids), moved, atol=1e-5, rtol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), moved, atol=1e-4, rtol=1e-4)
    own = make(family, RECIPES[recipe])
    assert type(merged) is type(own)
    assert set(merged.state_dict()) == set(own.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_changed_by_hand_travels_in_the_adapters_file(family: str, ids: torch.Tensor, tmp_path: Path):
    """The bargain writes to the base experts, which gradients need not reach."""
    model = adapted(make(family, KRONECKER), ("experts", "curvature"), carry_base=True)
    plain = logits(model, ids)
    block = model.get_base_model().model.layers[-1].mlp
    with torch.no_grad():
        block.base_expert.down_proj.weight.fill_(0.25)
        block.curvature.up_proj.left_inner.mul_(1.5)
    moved = logits(model, ids)
    assert not torch.equal(moved, plain)
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert {kind_of(name) for name in file} == {"base", "curvature", "experts"}
    start = "base_model.model.model.layers.2.mlp."
    assert torch.equal(file[f"{start}base_expert.down_proj.weight"], torch.full((16, 8), 0.25))
    assert torch.equal(file[f"{start}curvature.up_proj.left_inner"], block.curvature.up_proj.left_inner)
    loaded = PeftModel.from_pretrained(make(family, KRONECKER), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, ids), moved, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logits(model.merge_and_unload(), ids), moved, atol=1e-6, rtol=1e-6)


def test_the_base_stays_at_home_where_nothing_changes_it(tmp_path: Path):
    model = adapted(make("qwen2_moe", RESIDUAL), ("router",))
    model.save_pretrained(tmp_path)
    assert {kind_of(name) for name in load_file(tmp_path / "adapter_model.safetensors")} == {"router"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_bfloat16_stays_one(family: str, ids: torch.Tensor):
    model = make(family, KRONECKER).to(torch.bfloat16)
    plain = logits(model, ids)
    model = adapted(model, kinds_of(family, "soft"))
    assert torch.equal(logits(model, ids), plain)
    merged = model.merge_and_unload()
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(merged, ids), plain)


def test_rank_factor_and_dropout_arrive():
    model = make("qwen2_moe", RESIDUAL)
    config = lora(model, ("attention", "shared"), rank=3, alpha=7, dropout=0.1, carry_base=False)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 7, 0.1)
    model = get_peft_model(model, config)
    factors = [parameter for name, parameter in trainable(model).items() if "lora_A" in name]
    assert len(factors) == 3 * (4 + 3)
    assert {len(factor) for factor in factors} == {3}
    assert not {name for name in trainable(model) if "shared_expert_gate" in name}  # a single row has no low rank


@pytest.mark.parametrize("kinds", [("experts",), ("attention", "router"), ADAPTED])
def test_dropout_with_experts_or_routers_is_refused(kinds):
    with pytest.raises(TrainingError, match=r"^lora_dropout is 0\.1; with experts or routers accepted: 0$"):
        lora(make("deepseek", RESIDUAL), kinds, 2, 4, 0.1, False)


# Kinds as a whole


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_counts_are_sums_by_hand(family: str, recipe: str):
    hidden, width, experts, vocabulary, layers = 16, 8, 8, 260, 3
    dense = family == "deepseek"
    mixtures = layers - dense
    linear = 4 * hidden**2 + (0 if dense else 3 * hidden)  # Qwen's query, key and value have a bias
    shared = 3 * hidden * 16 + (0 if dense else hidden)  # and its shared expert a gate
    cosine = experts * hidden + experts**2 + 1
    sides = 2 * (4**2 + 4**2) + (2**2 + 4**2)  # hidden 16 = 4 x 4 once a side, width 8 = 2 x 4
    expected = {
        "experts": mixtures * experts * 3 * hidden * width,
        "base": 0 if recipe == "stock" else mixtures * 3 * hidden * width,
        "router": mixtures * (cosine if "cosine" in recipe else experts * hidden),
        "curvature": mixtures * experts * 2 * 3 * (sides - 32) if recipe.startswith("soft") else 0,
        "shared": mixtures * shared,
        "dense": 3 * hidden * 24 if dense else 0,
        "attention": layers * linear,
        "embeddings": vocabulary * hidden,  # tied
        "norms": (2 * layers + 1) * hidden,
    }
    expected = {kind: number for kind, number in expected.items() if number}
    model = make(family, RECIPES[recipe])
    assert present(model) == expected
    assert list(present(model)) == [kind for kind in KINDS if kind in expected]
    assert counts(model) == {kind: (number, number) for kind, number in expected.items()}
    assert sum(expected.values()) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("kinds", [("experts",), ("base", "router"), ("norms", "embeddings", "dense"), tuple(KINDS)])
def test_all_else_is_frozen(kinds, ids: torch.Tensor):
    model = make("deepseek", KRONECKER)
    train_only(model, ("attention",))
    train_only(model, kinds)  # as if nothing had been chosen before
    assert {kind_of(name) for name in trainable(model)} == set(kinds)
    for kind, (some, every) in check_trains(model, kinds).items():
        assert some == (every if kind in kinds else 0)
    model.train()(ids, labels=ids).loss.backward()
    assert {kind_of(name) for name, one in model.named_parameters() if one.grad is not None} == set(kinds)


def test_the_whole_of_a_sharded_parameter_counts():
    """Under ZeRO-3 a parameter is empty between its uses, and says how many numbers it stands for."""
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.ds_numel = 6  # type: ignore[attr-defined]
    assert whole_size(parameter) == 6
    assert whole_size(torch.nn.Parameter(torch.empty(2, 5))) == 10


# Refusals


def test_kinds_that_are_known():
    assert check_kinds([EVERYTHING], adapter=False) == tuple(KINDS)
    assert set(check_kinds(["router", EVERYTHING], adapter=True)) == set(KINDS) - {"embeddings", "norms"}
    assert check_kinds(["router", "base"], adapter=True) == ("router", "base")
    assert check_kinds(["norms"], adapter=False) == ("norms",)


@pytest.mark.parametrize(
    ("kinds", "adapter", "message"),
    [
        ([], False, "no kind of parameters is named; accepted: everything, experts, base, router, curvature, shared, "),
        ([], True, "no kind of parameters is named; accepted: everything, experts, router, "),
        (["expert"], False, "'expert' cannot be trained; accepted: everything, experts, base, router, curvature, "),
        ([EVERYTHING, "x"], False, "'x' cannot be trained; accepted: everything, experts, base, router, curvature, "),
        (["router", "norms"], True, "'norms' cannot be trained; accepted under --use_peft: everything, experts, "),
        (["embeddings"], True, "'embeddings' cannot be trained; accepted under --use_peft: everything, experts, "),
    ],
)
def test_kinds_that_are_refused(kinds, adapter: bool, message: str):
    with pytest.raises(TrainingError) as caught:
        check_kinds(kinds, adapter)
    said = str(caught.value)
    assert said.startswith(message)
    accepted = said.split("accepted")[1].split(": ")[1].split(", ")
    assert set(accepted) == {EVERYTHING, *KINDS} - ({"embeddings", "norms"} if adapter else set())


def test_what_a_model_has():
    qwen, deepseek = start_from("tiny").outline(), start_from("tiny-deepseek").outline()
    assert check_present(qwen, (EVERYTHING,)) == tuple(kind for kind in KINDS if kind not in ("dense", "curvature"))
    assert check_present(deepseek, (EVERYTHING,)) == tuple(kind for kind in KINDS if kind != "curvature")
    assert check_present(deepseek, ("dense", "base")) == ("dense", "base")
    with pytest.raises(TrainingError) as caught:
        check_present(qwen, ("router", "dense"))
    assert str(caught.value) == (
        "'dense' is to be trained, and NamexQwen2MoeForCausalLM has no such parameters (MLPs of the layers that are no "
        "mixtures); it has experts, base, router, shared, attention, embeddings, norms"
    )


@pytest.mark.parametrize(("recipe", "kind"), [("stock", "base"), ("residual", "curvature"), ("cosine", "curvature")])
def test_what_a_model_has_not(recipe: str, kind: str):
    with pytest.raises(TrainingError, match=f"^'{kind}' is to be trained, and .*; it has experts, "):
        check_present(make("deepseek", RECIPES[recipe]), ("experts", kind))


def test_what_calibration_has_measured_does_not_train():
    recipe = Recipe(merge="soft", curvature="calibrated")
    outline = start_from("tiny", recipe=recipe).outline()
    assert any(".mlp.curvature." in name for name, _ in outline.named_buffers())
    with pytest.raises(TrainingError, match=r"^'curvature' is to be trained, and .* \(trainable Kronecker curvature"):
        check_present(outline, ("curvature",))


def test_what_would_get_no_gradient_is_refused():
    model = make("qwen2_moe", RESIDUAL)
    train_only(model, ("experts", "router"))
    assert set(check_trains(model, ("experts", "router"))) == set(present(model))
    message = "^'{}' is to be trained, and no parameter of this kind would get a gradient$"
    for kind in ("base", "dense"):  # frozen, and absent
        with pytest.raises(TrainingError, match=message.format(kind)):
            check_trains(model, ("experts", kind))
    with pytest.raises(TrainingError, match=message.format("attention")):
        check_trains(adapted(model, ("experts",)), ("experts", "attention"))


def test_the_tables_figures():
    console = Console(file=StringIO(), width=100)
    console.print(table_of({"experts": (1500, 60_000), "base": (2000, 2000), "norms": (0, 500)}))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    rows = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in lines if line.startswith("│")]
    assert rows == [
        ["experts", "1,500", "60,000", "2.5 %"],
        ["base", "2,000", "2,000", "100.0 %"],
        ["norms", "0", "500", "0.0 %"],
        ["together", "3,500", "62,500", "5.6 %"],
    ]


def test_no_warning_says_that_an_adapter_is_odd():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted(make("deepseek", KRONECKER), kinds_of("deepseek", "soft"))
