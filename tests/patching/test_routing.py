"""``routing: cosine`` and ``stable``, and trainable curvature: both paths agree, and what is stored is true."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from transformers import AutoTokenizer

from namex_hf import Recipe, load_patched, patch_checkpoint, patch_model
from namex_hf.checkpoint.resolve import resolve
from namex_hf.errors import CalibrationError, RecipeError
from namex_hf.patching.estimate import MARGIN, space_needed
from namex_hf.patching.plan import make_plan
from namex_hf.patching.text import text_for
from tests.helpers.checkpoints import (
    PROJECTIONS,
    Tensors,
    differing,
    moe_layers,
    read_config,
    read_tensors,
    same_bits,
    settled_files,
    write_folder,
)
from tests.helpers.killing import Killing, is_clean, is_no_model, run, start
from tests.helpers.recipes import BY_TEXT, COSINE, FITTED, GROUPED, KRONECKER, SOFT, STABLE
from tests.helpers.reference import double
from tests.helpers.runs import block_inputs, live, load, logits, refused
from tests.helpers.toy_models import FAMILIES, VOCAB, add_tokenizer, fused, odd_config, toy_tensors

TOKENS = 512
CURVED: dict[str, Any] = {**SOFT, "curvature": "calibrated", "rank": 2}


def recipe_on(words: Path, **fields: Any) -> Recipe:
    """A short text where one is read."""
    recipe = Recipe(**fields)
    if not recipe.needs_text:
        return recipe
    return replace(recipe, calibration_data=str(words), calibration_tokens=fields.get("calibration_tokens", TOKENS))


def block(layer: int) -> str:
    return f"model.layers.{layer}.mlp"


FORMS: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "qwen-fused": ("qwen2_moe", torch.float32, {"fuse": True}),
    "qwen-bf16": ("qwen2_moe", torch.bfloat16, {}),
    "deepseek-fused-bf16": ("deepseek", torch.bfloat16, {"fuse": True}),
    "deepseek-many": ("deepseek", torch.float32, {"n_routed_experts": 20}),
}


def test_no_choice_is_ignored(odd, words: Path, tmp_path: Path) -> None:
    """No two recipes give the same tensors: a choice without a voice would pass every equality of paths."""
    source = odd("qwen2_moe", torch.float32, tokenizer=True)
    recipes: dict[str, dict[str, Any]] = {
        "linear": {},
        "norms": COSINE,
        "entropy": BY_TEXT,
        "entropy, longer": {**BY_TEXT, "calibration_tokens": 2 * TOKENS},
        "entropy, before": {**BY_TEXT, "calibrate": "before"},
        "entropy, other text": {**BY_TEXT, "seed": 1},
        "stable": STABLE,
        "stable, longer": {**STABLE, "calibration_tokens": 2 * TOKENS},
        "stable, before": {**STABLE, "calibrate": "before"},
        "stable, other text": {**STABLE, "seed": 1},
        "stable, two": {**STABLE, **SOFT, "top_k": 2},
        "kronecker": KRONECKER,
        "kronecker 2": {**KRONECKER, "rank": 2},
        "kronecker 2, other": {**KRONECKER, "rank": 2, "seed": 1},
    }
    results: dict[str, Tensors] = {}
    for name, fields in recipes.items():
        patch_checkpoint(source, tmp_path / name, recipe_on(words, **fields))
        results[name] = read_tensors(tmp_path / name)
    for name, result in results.items():
        for other in set(results) - {name}:
            assert differing(result, results[other]), f"{name} and {other} are one"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fields", [COSINE, BY_TEXT, STABLE, {**KRONECKER, "rank": 3}], ids=str)
def test_all_else_is_as_without(odd, words: Path, tmp_path: Path, family: str, fields: dict[str, Any]) -> None:
    """Experts, router and base experts byte for byte; no text is heard by a base."""
    source, merge = odd(family, torch.bfloat16, tokenizer=True, shards=2), fields.get("merge", "residual")
    patch_checkpoint(source, tmp_path / "out", recipe_on(words, **fields))
    patch_checkpoint(source, tmp_path / "bare", Recipe(merge=merge))
    bare, after = read_tensors(tmp_path / "bare"), read_tensors(tmp_path / "out")
    added = {name for name in after if {"cosine_router", "stable_router", "curvature"} & {*name.split(".")}}
    assert after.keys() - bare.keys() == added
    assert {name.split(".")[2] for name in added} == {str(n) for n in moe_layers(read_config(source))}
    assert differing(bare, {name: after[name] for name in bare}) == []


# Cosine.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "fields", [{"method": "smoe"}, {}, {**SOFT, "method": "smear"}, CURVED, GROUPED, FITTED], ids=str
)
def test_a_cosine_router_is_made_from_the_folders_own_gate(
    odd, words: Path, tmp_path: Path, form: str, fields: dict[str, Any]
) -> None:
    """P spans the rows of W and no more, e_i are W_i in its terms, and the scale is what weights and norm say."""
    family, dtype, changes = FORMS[form]
    source = odd(family, dtype, tokenizer=True, **changes)
    recipe = recipe_on(words, **fields, **COSINE, temperature="norms")
    report = patch_checkpoint(source, tmp_path / "out", recipe)
    before, after = read_tensors(source), read_tensors(tmp_path / "out")
    near = 3e-6 if dtype == torch.float32 else 1e-2
    for record in report.layers:
        name = block(record["layer"])
        gate, projection, embeddings = (
            double(after[f"{name}.{part}"])
            for part in ("gate.weight", "cosine_router.projection", "cosine_router.embeddings")
        )
        rank = min(gate.shape)
        assert projection.shape == (rank, 16)
        assert np.abs(projection @ projection.T - np.eye(rank)).max() < near
        assert np.abs(gate @ projection.T @ projection - gate).max() < 3 * near * np.abs(gate).max()
        assert np.abs(gate @ projection.T - embeddings).max() < 3 * near * np.abs(gate).max()
        norm = double(after[f"model.layers.{record['layer']}.post_attention_layernorm.weight"])
        right = np.linalg.svd(gate, full_matrices=False)[2]
        scale = np.linalg.norm(gate, axis=1).mean() * np.linalg.norm(right * norm)
        assert double(after[f"{name}.cosine_router.scale"]) == pytest.approx([scale], rel=max(near, 1e-5))
        if recipe.merge.kind != "grouped":
            assert same_bits(after[f"{name}.gate.weight"], before[f"{name}.gate.weight"])
        elif recipe.to_dict()["fit"] == "none":
            rows = double(before[f"{name}.gate.weight"])
            means = np.stack([rows[group].mean(0) for group in record["groups"]])
            assert gate == pytest.approx(means, abs=near * np.abs(rows).max())


@torch.no_grad()
def angles(inputs: torch.Tensor, tensors: Tensors, name: str) -> torch.Tensor:
    """Cosines of every token and expert, in float64."""
    projected = inputs.double() @ tensors[f"{name}.cosine_router.projection"].double().T
    rows = tensors[f"{name}.cosine_router.embeddings"].double()
    return (projected / projected.norm(dim=-1, keepdim=True)) @ (rows / rows.norm(dim=-1, keepdim=True)).T


def agreement(linear: torch.Tensor, chosen: torch.Tensor) -> float:
    pairs = zip(linear.tolist(), chosen.tolist(), strict=True)
    return float(np.mean([len({*one} & {*other}) / len(one) for one, other in pairs]))


def balance(index: torch.Tensor, experts: int) -> float:
    return float(entropy(np.bincount(index.flatten().numpy(), minlength=experts)) / np.log(experts))


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("qwen2_moe", {"method": "smoe"}),
        ("qwen2_moe", {}),
        ("deepseek", {**SOFT, "method": "camex"}),
        ("deepseek", {**SOFT, "method": "smear"}),
        ("qwen2_moe", FITTED),
        ("deepseek", {**FITTED, "experts": 5}),
    ],
    ids=str,
)
@pytest.mark.parametrize("calibrate", ["after", "before"])
def test_as_decided_as_the_linear_router_on_the_text(
    odd, words: Path, tmp_path: Path, family: str, fields: dict[str, Any], calibrate: str
) -> None:
    """Mean entropies are equal in every layer, on inputs that hooks take from transformers' own forward pass.

    ``after``: of the finished patched model; ``before``: of the original. And how the two choose, for the record.
    """
    source = odd(family, torch.float32, tokenizer=True)
    recipe = recipe_on(words, **BY_TEXT, **fields, calibrate=calibrate)
    report = patch_checkpoint(source, tmp_path / "out", recipe)
    text = text_for(recipe, read_config(source), AutoTokenizer.from_pretrained(source))
    told, tensors = load(tmp_path / "out" if calibrate == "after" else source), read_tensors(tmp_path / "out")
    for record in report.layers:
        name = block(record["layer"])
        inputs = block_inputs(told, record["layer"], text.ids).flatten(0, 1)
        linear = inputs.double() @ tensors[f"{name}.gate.weight"].double().T
        scores = tensors[f"{name}.cosine_router.scale"].double() * angles(inputs, tensors, name)
        one, other = (float(entropy(double(s.softmax(-1)), axis=1).mean()) for s in (scores, linear))
        assert one == pytest.approx(other, abs=2e-5)
        routing = record["routing"]
        assert routing["scale"] == pytest.approx(float(tensors[f"{name}.cosine_router.scale"]))
        all_of = recipe.merge.method == "smear"
        top_k = linear.shape[1] if all_of else 3
        best, chosen = linear.topk(top_k).indices, scores.topk(top_k).indices
        assert routing["agreement"] == pytest.approx(agreement(best, chosen), abs=2e-3)
        firsts = float((best[:, 0] == chosen[:, 0]).double().mean())
        assert routing["agreement_first"] == pytest.approx(firsts, abs=4e-3)
        assert 0.2 < firsts < 1
        assert routing["load_entropy"] == pytest.approx(balance(chosen, linear.shape[1]), abs=2e-3)
        assert routing["load_entropy_linear"] == pytest.approx(balance(best, linear.shape[1]), abs=2e-3)
        assert routing.keys() == {"agreement", "agreement_first", "load_entropy", "load_entropy_linear", "scale"}


def test_by_norms_nothing_is_recorded_without_a_text(odd, words: Path, tmp_path: Path) -> None:
    """With one that is read anyway the comparison is made too."""
    source = odd("deepseek", torch.float32, tokenizer=True)
    report = patch_checkpoint(source, tmp_path / "out", Recipe(**COSINE))
    assert all("routing" not in layer for layer in report.layers)
    assert "calibration" not in report.run
    report = patch_checkpoint(source, tmp_path / "read", recipe_on(words, **COSINE, **CURVED, temperature="norms"))
    tensors = read_tensors(tmp_path / "read")
    for layer in report.layers:
        scale = tensors[f"{block(layer['layer'])}.cosine_router.scale"]
        assert layer["routing"]["scale"] == pytest.approx(float(scale))


# Stable.


@torch.no_grad()
def hear(model: Any, layer: int, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the linear router of a layer chooses for every token, best first, and its softmax values there."""
    seen: list[Any] = []
    gate = model.model.layers[layer].mlp.gate
    handle = gate.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model(ids, use_cache=False)
    handle.remove()
    (inputs,) = seen
    value, index = (inputs.flatten(0, -2) @ gate.weight.T).softmax(-1).topk(gate.top_k)
    return index, value


def counted(ids: torch.Tensor, index: torch.Tensor, value: torch.Tensor) -> dict[int, list[tuple[int, float, int]]]:
    """For every id that there is, its experts with how often they were chosen and their gate mass, best first."""
    counts: Counter[tuple[int, int]] = Counter()
    mass: dict[tuple[int, int], float] = {}
    for one, experts, values in zip(ids.tolist(), index.tolist(), value.tolist(), strict=True):
        for expert, share in zip(experts, values, strict=True):
            counts[one, expert] += 1
            mass[one, expert] = mass.get((one, expert), 0.0) + share
    found: dict[int, list[tuple[int, float, int]]] = {}
    for (one, expert), count in counts.items():
        found.setdefault(one, []).append((count, mass[one, expert], expert))
    return {one: sorted(own, reverse=True) for one, own in found.items()}


STABLE_ONES = [
    ("qwen2_moe", {"method": "smoe"}, 3),
    ("deepseek", {}, 3),
    ("deepseek", {**SOFT, "method": "camex", "base": "mean"}, 3),
    ("qwen2_moe", {**SOFT, "method": "smear"}, 3),
    ("qwen2_moe", {**SOFT, "top_k": 2}, 2),
    ("qwen2_moe", GROUPED, 3),
    ("deepseek", FITTED, 3),
    ("deepseek", {**FITTED, "experts": 2}, 2),
]


@pytest.mark.parametrize(("family", "fields", "top_k"), STABLE_ONES, ids=str)
@pytest.mark.parametrize("calibrate", ["after", "before"])
def test_a_table_is_what_the_router_chose_most_often(
    odd, words: Path, tmp_path: Path, family: str, fields: dict[str, Any], top_k: int, calibrate: str
) -> None:
    """Counted again in every layer, by hooks on the router in transformers' own forward pass over the text; and how
    the table does on the sequences that it has not seen, for the record."""
    source = odd(family, torch.float32, tokenizer=True)
    recipe = recipe_on(words, **STABLE, **fields, calibrate=calibrate)
    report = patch_checkpoint(source, tmp_path / "out", recipe)
    text = text_for(recipe, read_config(source), AutoTokenizer.from_pretrained(source))
    patched, tensors = load(tmp_path / "out"), read_tensors(tmp_path / "out")
    assert text.ids.shape == (8, 64)  # of one source: the last one is held back
    for record in report.layers:
        layer, name = record["layer"], block(record["layer"])
        if calibrate == "after":
            index, value = hear(patched, layer, text.ids)
        else:
            inputs = block_inputs(load(source), layer, text.ids).flatten(0, 1)
            value, index = (inputs @ tensors[f"{name}.gate.weight"].T).softmax(-1).topk(top_k)
        table, ids = tensors[f"{name}.stable_router.assignment"], text.ids.flatten()
        assert table.dtype == torch.int32
        assert table.shape == (VOCAB, top_k)
        wanted = counted(ids[: 7 * 64], index[: 7 * 64], value[: 7 * 64])
        for one in range(VOCAB):
            assert table[one].tolist() == [expert for _, _, expert in wanted.get(one, [])][:top_k] or [-1] * top_k
        unseen = set(ids[7 * 64 :].tolist()) - wanted.keys()
        assert unseen, "the text has no id that is in the held-out sequence alone"
        assert (table[sorted(unseen)] == -1).all()

        linear, own = index[7 * 64 :], ids[7 * 64 :]
        known = table[own, 0] >= 0
        chosen = torch.where(known[:, None], table[own].long(), linear)
        experts, routing = tensors[f"{name}.gate.weight"].shape[0], record["routing"]
        assert routing == pytest.approx(
            {
                "agreement": agreement(linear, chosen),
                "agreement_first": float((linear[:, 0] == chosen[:, 0]).double().mean()),
                "load_entropy_linear": balance(linear, experts),
                "load_entropy": balance(chosen, experts),
                "assigned": float(known.double().mean()),
                "agreement_assigned": agreement(linear[known], chosen[known]),
            },
            abs=1e-6,
        )


@torch.no_grad()
@pytest.mark.parametrize("fields", [{**STABLE, "method": "smoe"}, STABLE, {**BY_TEXT, "method": "smoe"}, BY_TEXT])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_error_is_what_the_block_does(odd, words: Path, tmp_path: Path, family: str, fields: Any) -> None:
    """Outputs of the finished model's blocks against the original's, on the finished model's inputs."""
    source, recipe = odd(family, torch.float32, tokenizer=True), recipe_on(words, **fields)
    report = patch_checkpoint(source, tmp_path / "out", recipe)
    text = text_for(recipe, read_config(source), AutoTokenizer.from_pretrained(source))
    original, patched = load(source), load(tmp_path / "out")
    for record in report.layers:
        inputs = block_inputs(patched, record["layer"], text.ids)
        old, new = (model.model.layers[record["layer"]].mlp for model in (original, patched))
        heard: list[torch.Tensor] = []
        handle = old.experts.register_forward_hook(lambda module, given, output, heard=heard: heard.append(output))
        change = new(inputs, text.ids) - old(inputs)
        handle.remove()
        (routed,) = heard
        (error,) = record["errors"]
        assert error["stage"] == "residual"
        assert error["error"] == pytest.approx(float(change.square().sum() / routed.square().sum()), rel=1e-3)
        assert error["error"] > 1e-4


@torch.no_grad()
def test_tokens_of_an_id_hear_the_same_experts_wherever_they_stand(odd, words: Path, tmp_path: Path) -> None:
    """In every layer; those of an id that no text has had go where the linear router sends them."""
    source = odd("qwen2_moe", torch.float32, tokenizer=True)
    patch_checkpoint(source, tmp_path / "out", recipe_on(words, **STABLE, calibration_tokens=256))
    model = load(tmp_path / "out")
    tables = {layer: model.model.layers[layer].mlp.stable_router.assignment for layer in (0, 2, 3)}
    ids = torch.randint(0, VOCAB, (3, 40), generator=torch.Generator().manual_seed(1))
    fresh = [one for one in range(VOCAB) if tables[0][one, 0] < 0 and one in ids]
    assert fresh
    heard: dict[int, Any] = {}
    for layer in tables:
        own = model.model.layers[layer].mlp
        own.experts.register_forward_pre_hook(lambda m, given, n=layer: heard.__setitem__(n, given[1]))
        own.gate.register_forward_hook(lambda m, given, output, n=layer: heard.__setitem__(-1 - n, output[2]))
    model(ids)
    for layer, table in tables.items():
        for token, one in enumerate(ids.flatten().tolist()):
            chosen = heard[-1 - layer][token] if table[one, 0] < 0 else table[one]
            assert heard[layer][token].tolist() == chosen.tolist()


# Trainable curvature.

SIDES = {"gate_proj": (2, 4, 4, 4), "up_proj": (2, 4, 4, 4), "down_proj": (4, 4, 2, 4)}
PARTS = ("left_outer", "left_inner", "right_outer", "right_inner")


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("method", ["namex-full", "smear"])
def test_a_trainable_curvature_begins_as_the_identity(odd, tmp_path: Path, family: str, rank: int, method: str) -> None:
    """Names, shapes and numbers; the model says what it says without one."""
    source, fields = odd(family, torch.float32, tokenizer=True), {"method": method, **SOFT}
    recipe = Recipe(**fields, curvature="kronecker", rank=rank)
    patch_checkpoint(source, tmp_path / "out", recipe)
    patch_checkpoint(source, tmp_path / "bare", Recipe(**fields))
    after, bare = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "bare")
    shapes = {
        f"{block(layer)}.curvature.{name}.{part}": (7, rank, side, side)
        for layer in moe_layers(read_config(source))
        for name in PROJECTIONS
        for part, side in zip(PARTS, SIDES[name], strict=True)
    }
    assert {name: tuple(after[name].shape) for name in after.keys() - bare.keys()} == shapes
    for name in shapes:
        products = after[name].unbind(1)
        assert (products[0] == torch.eye(products[0].shape[-1])).all()
        for other in products[1:]:
            assert bool(other.any()) == (not name.endswith("right_inner"))
            assert bool((other[0] != other[1]).any()) == (not name.endswith("right_inner"))
    plan = make_plan(resolve(str(source)), recipe, "5GB")
    assert plan.bytes_out == sum(tensor.nbytes for tensor in after.values())
    without = make_plan(resolve(str(source)), Recipe(**fields), "5GB").bytes_out
    assert plan.bytes_out - without == sum(after[name].nbytes for name in shapes)
    said, wanted = logits(load(tmp_path / "out")), logits(load(tmp_path / "bare"))
    assert said.numpy() == pytest.approx(wanted.numpy(), abs=2e-5)


def test_the_seed_draws_what_products_begin_with(odd, tmp_path: Path) -> None:
    """Of rank 2 every layer's, each its own; of rank 1 there is nothing to draw."""
    source, found = odd("deepseek", torch.bfloat16, tokenizer=True), {}
    for rank in (1, 2):
        for seed in (0, 1, 2**64 - 1):
            out = tmp_path / f"{rank}-{seed}"
            patch_checkpoint(source, out, Recipe(**KRONECKER, rank=rank, seed=seed))
            found[rank, seed] = read_tensors(out)
    drawn = {name for name in found[2, 0] if ".curvature." in name and not name.endswith("right_inner")}
    assert differing(found[1, 0], found[1, 1]) == differing(found[1, 0], found[1, 2**64 - 1]) == []
    assert differing(found[2, 0], found[2, 1]) == differing(found[2, 0], found[2, 2**64 - 1]) == sorted(drawn)
    for name in drawn:
        other = name.replace("layers.1.", "layers.2.")
        assert other == name or not torch.equal(found[2, 0][name], found[2, 0][other])


@pytest.mark.parametrize("routing", [COSINE, STABLE])
def test_a_trainable_curvature_and_a_routing_of_its_own(odd, words: Path, tmp_path: Path, routing: Any) -> None:
    """Each is what it is without the other: text passes an identity as it passes none."""
    source = odd("qwen2_moe", torch.float32, tokenizer=True)
    for name, fields in {"both": {**KRONECKER, "rank": 2}, "plain": SOFT}.items():
        patch_checkpoint(source, tmp_path / name, recipe_on(words, **fields, **routing))
    patch_checkpoint(source, tmp_path / "curved", Recipe(**KRONECKER, rank=2))
    both, *others = (read_tensors(tmp_path / name) for name in ("both", "plain", "curved"))
    for one in others:
        assert differing({name: both[name] for name in one}, one) == []
    assert both.keys() == others[0].keys() | others[1].keys()


@pytest.mark.parametrize("layout", ["per-expert", "fused"])
@pytest.mark.parametrize("fields", [COSINE, {**BY_TEXT, **FITTED}, {**STABLE, "method": "smoe"}, KRONECKER], ids=str)
def test_without_shared_dtype(words: Path, tmp_path: Path, layout: str, fields: dict[str, Any]) -> None:
    """Routers and norms in float32 beside experts in bfloat16: a router's parts are as the router, curvature is as the
    experts, and the sizes are known."""
    config = odd_config("qwen2_moe", torch.bfloat16)
    tensors = toy_tensors(config, torch.bfloat16)
    tensors = {n: t.float() if "norm" in n or "mlp.gate." in n else t for n, t in tensors.items()}
    source = write_folder(tmp_path / "in", config, fused(config, tensors) if layout == "fused" else tensors, 2)
    add_tokenizer(source)
    recipe, out = recipe_on(words, **fields), tmp_path / "out"
    patch_checkpoint(source, out, recipe)
    written = read_tensors(out)
    for name, tensor in written.items():
        if ".cosine_router." in name or "mlp.gate." in name:
            assert tensor.dtype == torch.float32, name
        elif ".curvature." in name or ".base_expert." in name:
            assert tensor.dtype == torch.bfloat16, name
    assert make_plan(resolve(str(source)), recipe, "5GB").bytes_out == sum(t.nbytes for t in written.values())
    assert logits(load(out)).isfinite().all()


# What is refused.


@pytest.mark.parametrize("fields", [{"method": "smoe"}, {}, SOFT, GROUPED], ids=str)
def test_a_text_of_one_sequence_leaves_none_for_validation(
    odd, words: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    """A table must be tried on others than it was made from: answered before anything is written."""
    source, recipe = odd("qwen2_moe", torch.bfloat16, tokenizer=True), recipe_on(words, **STABLE, **fields)
    one, says = replace(recipe, calibration_tokens=100), "1 sequences, and no file or data set has two"
    refused(source, tmp_path / "out", one, CalibrationError, says)
    model, tokenizer = load(source), AutoTokenizer.from_pretrained(source)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CalibrationError, match=says):
        patch_model(model, one, tokenizer=tokenizer)
    assert differing(before, model.state_dict()) == []


def test_an_entropy_needs_no_second_sequence(odd, words: Path, tmp_path: Path) -> None:
    source = odd("qwen2_moe", torch.float32, tokenizer=True)
    recipe = recipe_on(words, **BY_TEXT, calibration_tokens=64)
    patch_checkpoint(source, tmp_path / "out", recipe)
    assert differing(load(tmp_path / "out").state_dict(), live(source, recipe).state_dict()) == []


@pytest.mark.parametrize("fields", [STABLE, BY_TEXT, {**STABLE, "method": "smoe"}, {**STABLE, **GROUPED}], ids=str)
def test_text_that_cannot_be_had(odd, words: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    for family in FAMILIES:
        bare, recipe = odd(family, torch.bfloat16), recipe_on(words, **fields)
        refused(bare, tmp_path / "out", recipe, CalibrationError, "model has no tokenizer, and this recipe reads")
        model = load(bare)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(CalibrationError, match="patch_model needs tokenizer="):
            patch_model(model, recipe)
        assert differing(before, model.state_dict()) == []
        assert model.config.model_type == family
    source = odd("deepseek", torch.bfloat16, tokenizer=True)
    nowhere = recipe_on(tmp_path / "no.txt", **fields)
    refused(source, tmp_path / "out", nowhere, CalibrationError, "no such file or folder")


def test_no_stock_checkpoint_of_another_routing(odd, words: Path, tmp_path: Path) -> None:
    source = odd("deepseek", torch.bfloat16, tokenizer=True)
    for routing in ("cosine", "stable"):
        recipe = recipe_on(words, routing=routing, **GROUPED)
        with pytest.raises(RecipeError, match=rf"needs merge 'grouped', routing 'linear' .*routing={routing}"):
            patch_checkpoint(source, tmp_path / "out", recipe, export_as="qwen2_moe")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fields", [COSINE, STABLE], ids=str)
def test_residual_still_needs_mass_that_is_left_over(odd, words: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    """A model that renormalises its top-k: another routing leaves nothing over either, others merges go on."""
    source = odd("deepseek", torch.float32, tokenizer=True, norm_topk_prob=True)
    refused(source, tmp_path / "out", recipe_on(words, **fields), RecipeError, "norm_topk_prob = true")
    for number, others in enumerate(({"method": "smoe"}, SOFT, FITTED)):
        recipe, out = recipe_on(words, **fields, **others), tmp_path / str(number)
        patch_checkpoint(source, out, recipe)
        stored, patched = load(out), live(source, recipe)
        assert differing(stored.state_dict(), patched.state_dict()) == []
        assert same_bits(logits(stored), logits(patched))


# Killed.

OPTIONS: dict[str, Any] = {"shard_size": "60KB"}
KILLED: dict[str, tuple[dict[str, Any], tuple[tuple[str, int], ...], list[int]]] = {
    "stable-residual": (
        {**STABLE, "momentum": "complex", "every": 2},
        (("checking", 3), ("layer 1: read", 1), ("layer 2", 1), ("layer 5: read", 1), ("layer 9: read", 1)),
        [9, 10, 11, 12],
    ),
    "cosine-fitted": (
        {**COSINE, **FITTED, "fit_steps": 5},
        (("layer 1: router", 1), ("layer 3", 1), ("layer 6: merged", 1), ("layer 8: down", 2)),
        [8, 9, 10, 11, 12],
    ),
    "stable-smoe": ({**STABLE, "method": "smoe"}, (("layer 4", 1), ("copying", 2)), []),
    "kronecker-entropy": (
        {**KRONECKER, **BY_TEXT, "rank": 2, "segment": 16, "method": "smear"},
        (("layer 2: read", 1), ("layer 7", 1), ("layer 11: read", 1)),
        [11, 12],
    ),
}


def killed(source: Path, out: Path, recipe: Recipe, what: str, times: int) -> None:
    process = start(source, out, recipe, progress=Killing(what, times), **OPTIONS)
    process.join()
    assert process.exitcode == -9, f"the run was not killed: it ended with {process.exitcode}"
    is_no_model(out)
    plan = make_plan(resolve(str(source)), recipe, OPTIONS["shard_size"])
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert size <= space_needed(plan) - MARGIN + 4096, "the disk may be too small for this run"


@pytest.mark.parametrize("name", KILLED)
def test_killed_again_and_again(long_checkpoint: Path, words: Path, tmp_path: Path, name: str) -> None:
    """What was finished is not made again, and all is as undisturbed, the record too."""
    fields, moments, left = KILLED[name]
    out, recipe = tmp_path / "killed", recipe_on(words, **fields, calibration_tokens=256)
    run(long_checkpoint, tmp_path / "undisturbed", recipe, **OPTIONS)
    for what, times in moments:
        killed(long_checkpoint, out, recipe, what, times)
    whole = {path.name: path.stat().st_mtime_ns for path in out.glob("model-*.safetensors")}
    told: list[str] = []
    patch_checkpoint(long_checkpoint, out, recipe, progress=lambda event: told.append(str(event)), **OPTIONS)
    assert [int(what.split()[1].rstrip(":")) for what in told if what.endswith(": read")] == left
    is_clean(out)
    wanted = settled_files(tmp_path / "undisturbed")
    assert {"config.json", "namex/recipe.yaml", "namex/statistics.safetensors"} < set(wanted)
    assert settled_files(out) == wanted
    assert whole.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("model-*.safetensors")}.items()
    load_patched(out)
    one, other = (json.loads((folder / "namex/report.json").read_text()) for folder in (out, tmp_path / "undisturbed"))
    for layers in (one["layers"], other["layers"]):
        assert all(layer.pop("seconds") > 0 for layer in layers)
    assert one["layers"] == other["layers"]
    assert all("routing" in layer for layer in one["layers"])


def test_killed_between_a_layer_and_the_stream_above_it(long_checkpoint: Path, words: Path, tmp_path: Path) -> None:
    """The layer is there, the text has not gone through it yet: it is made again, to the same bytes."""
    out, earlier = tmp_path / "killed", tmp_path / "stream"
    stream, recipe = out / ".namex" / "arrived.safetensors", recipe_on(words, **STABLE, calibration_tokens=256)
    run(long_checkpoint, tmp_path / "undisturbed", recipe, **OPTIONS)
    killed(long_checkpoint, out, recipe, "layer 9", 1)
    shutil.copy(stream, earlier)
    killed(long_checkpoint, out, recipe, "layer 10", 1)
    shutil.copy(earlier, stream)
    assert (out / ".namex" / "layer-00010.safetensors").is_file()
    patch_checkpoint(long_checkpoint, out, recipe, **OPTIONS)
    is_clean(out)
    assert settled_files(out) == settled_files(tmp_path / "undisturbed")
