"""``merge: soft`` on calibration text: both paths agree, what is stored is what the finished model hears."""

import json
import random
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from transformers import AutoTokenizer

from namex_hf import Recipe, load_patched, patch_checkpoint, patch_model
from namex_hf.checkpoint.resolve import resolve
from namex_hf.errors import CalibrationError, CheckpointError, RecipeError
from namex_hf.patching import blocks as patched_blocks
from namex_hf.patching.estimate import MARGIN, space_needed
from namex_hf.patching.plan import make_plan
from namex_hf.patching.text import text_for
from namex_hf.progress import ProgressEvent
from tests.helpers.checkpoints import (
    INDEX,
    PROJECTIONS,
    Tensors,
    differing,
    moe_layers,
    read_config,
    read_tensors,
    rewrite_tensors,
    same_bits,
    settled_files,
    write_folder,
)
from tests.helpers.killing import TRIES, Killing, is_clean, is_no_model, kill_after, run, settled, start
from tests.helpers.recipes import CURVED, CURVES, MOMENTUM
from tests.helpers.reference import Matrices, assert_rounded, base_experts, double, expert64, experts_at, neurons64
from tests.helpers.runs import block_inputs, block_output, live, load, refused
from tests.helpers.toy_models import FAMILIES, add_tokenizer, fused, odd_config, toy_tensors

TOKENS = 1024


def recipe_on(words: Path, **fields: Any) -> Recipe:
    """Short segments and a short text, unless said otherwise."""
    values = {"merge": "soft", "segment": 4, "calibration_tokens": TOKENS, **fields}
    return Recipe(calibration_data=str(words), **values)


FORMS: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "qwen-fused": ("qwen2_moe", torch.float32, {"fuse": True}),
    "qwen-bf16": ("qwen2_moe", torch.bfloat16, {}),
    "deepseek-fused-bf16": ("deepseek", torch.bfloat16, {"fuse": True}),
    "deepseek-renormalised": ("deepseek", torch.float32, {"norm_topk_prob": True}),
}


def test_every_choice_is_heard(odd, words: Path, tmp_path: Path) -> None:
    """No two recipes give the same tensors: a choice that is ignored would pass every equality of paths.

    The last ones decide how the model speaks, and are heard in what the layers above have measured.
    """
    source = odd("qwen2_moe", torch.float32, tokenizer=True)
    recipes = {**CURVES, "steady": {**CURVED, "method": "ep-camex"}, "plain": {}, "first": {**CURVED, "base": "first"}}
    others: dict[str, Any] = {"ridge": 0.1, "seed": 1, "calibration_tokens": 2 * TOKENS, "rank": 2, "gamma": 0.5}
    others |= {"segment": 16, "eta": 0.5, "top_k": 1}
    recipes |= {name: {**CURVED, name: value} for name, value in others.items()}
    recipes["smear of two"] = {**CURVED, "method": "smear", "top_k": 2}
    known: dict[str, str] = {}
    for name, fields in recipes.items():
        patch_checkpoint(source, tmp_path / name, recipe_on(words, **fields) if fields else Recipe(merge="soft"))
        tensors = sorted(read_tensors(tmp_path / name).items())
        result = sha256(b"".join(part for n, t in tensors for part in (n.encode(), t.numpy().tobytes()))).hexdigest()
        assert result not in known, f"{name} and {known[result]} are one"
        known[result] = name


def orders_of(before: Tensors, after: Tensors, layer: int) -> list[list[int]]:
    """How the neurons of a layer's experts were reordered; every number of the result must come from its place."""
    orders = []
    for expert in range(7):
        old, new = (
            [tensors[f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"] for name in PROJECTIONS]
            for tensors in (before, after)
        )
        order = [int((old[0] == row).all(1).nonzero()) for row in new[0]]
        assert sorted(order) == list(range(8))
        assert same_bits(old[0][order], new[0])
        assert same_bits(old[1][order], new[1])
        assert same_bits(old[2][:, order], new[2])
        orders.append(order)
    return orders


AS_THEY_WERE = list(range(8))


def shuffled(source: Path, folder: Path) -> Path:
    """The same model; the neurons of every expert stand in an order drawn by lot."""
    tensors, lot = read_tensors(source), torch.Generator().manual_seed(6)
    for name in [name for name in tensors if ".experts." in name and name.endswith("gate_proj.weight")]:
        order = torch.randperm(8, generator=lot)
        gate, up, down = (name.replace("gate_proj", other) for other in PROJECTIONS)
        tensors |= {gate: tensors[gate][order], up: tensors[up][order], down: tensors[down][:, order].contiguous()}
    add_tokenizer(write_folder(folder, read_config(source), tensors))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("align", ["activations", "weights"])
def test_aligned_experts_are_the_same_functions(odd, words: Path, tmp_path: Path, family: str, align: str) -> None:
    """Neurons change places and nothing else does; those of the most used expert stay where they were."""
    source = shuffled(odd(family, torch.bfloat16), tmp_path / "in")
    report = patch_checkpoint(source, tmp_path / "out", recipe_on(words, **CURVED, align=align))
    before, after = read_tensors(source), read_tensors(tmp_path / "out")
    assert differing(*({n: t for n, t in tensors.items() if ".experts." not in n} for tensors in (before, after))) == (
        sorted(name for name in after if ".base_expert." in name or ".curvature." in name)
    )
    inputs = np.random.default_rng(2).standard_normal((5, 16))
    for record in report.layers:
        orders, most = orders_of(before, after, record["layer"]), int(np.argmax(record["mass"]))
        assert orders[most] == AS_THEY_WERE
        assert all(order != AS_THEY_WERE for expert, order in enumerate(orders) if expert != most)
        one, other = (experts_at(folder, record["layer"]) for folder in (source, plain(source, tmp_path / "out")))
        for expert in range(7):
            said, wanted = (expert64(inputs, {name: m[name][expert] for name in PROJECTIONS}) for m in (other, one))
            assert said == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def plain(source: Path, out: Path) -> Path:
    """The result without what was added, as a checkpoint of the original's family."""
    folder = out.parent / f"{out.name}-plain"
    if not folder.exists():
        kept = {n: t for n, t in read_tensors(out).items() if ".base_expert." not in n and ".curvature." not in n}
        write_folder(folder, read_config(source), kept)
    return folder


@pytest.mark.parametrize("align", ["activations", "weights"])
def test_the_order_is_the_best(odd, words: Path, tmp_path: Path, align: str) -> None:
    """Neurons stand where their sum of likenesses to the most used expert's is largest, by an assignment in numpy."""
    source, recipe = shuffled(odd("deepseek", torch.float32), tmp_path / "in"), recipe_on(words, align=align)
    report = patch_checkpoint(source, tmp_path / "out", recipe)
    text = text_for(recipe, read_config(source), AutoTokenizer.from_pretrained(source))
    before, after, patched = read_tensors(source), read_tensors(tmp_path / "out"), load(tmp_path / "out")
    for record in report.layers:
        layer, experts = record["layer"], experts_at(source, record["layer"])
        inputs = double(block_inputs(patched, layer, text.ids).flatten(0, 1))
        views = [view({n: experts[n][expert] for n in PROJECTIONS}, inputs, align) for expert in range(7)]
        reference = views[int(np.argmax(record["mass"]))]
        for order, own in zip(orders_of(before, after, layer), views, strict=True):
            likeness = reference.T @ own
            rows, best = linear_sum_assignment(likeness, maximize=True)
            assert likeness[rows, order].sum() == pytest.approx(likeness[rows, best].sum(), abs=1e-4)


def view(expert: Matrices, inputs: np.ndarray, align: str) -> np.ndarray:
    """What neurons are compared by, a column each: their weights, or their standardised activations."""
    if align == "weights":
        parts = expert["gate_proj"].T, expert["up_proj"].T, expert["down_proj"]
        return np.concatenate([part / np.linalg.norm(part, axis=0) for part in parts])
    values = neurons64(inputs, expert)
    values = values - values.mean(0)
    return values / np.linalg.norm(values, axis=0)


SIZES = {"usage": (), "input_floor": (), "input_directions": (16, 2), "neuron_floor": (), "neuron_directions": (8, 2)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["namex-full", "camex", "smear"])
def test_what_is_added_and_where(odd, words: Path, tmp_path: Path, family: str, method: str) -> None:
    """Base experts and curvatures, in the experts' dtype; with ``align: none`` all else is the source's byte for byte,
    and the base experts, which no text is heard by, are those of the recipe without one."""
    source = odd(family, torch.bfloat16, tokenizer=True, fuse=True, shards=2)
    before = read_tensors(odd(family, torch.bfloat16, tokenizer=True))
    recipe = recipe_on(words, **CURVED, method=method, align="none", rank=2)
    patch_checkpoint(source, tmp_path / "out", recipe)
    patch_checkpoint(source, tmp_path / "bare", Recipe(merge="soft", segment=4, method=method))
    after, bare = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "bare")
    layers = [f"model.layers.{layer}.mlp" for layer in moe_layers(read_config(source))]
    bases = {f"{b}.base_expert.{name}.weight" for b in layers for name in PROJECTIONS if method != "smear"}
    shapes = {f"{block}.curvature.{name}": (7, *size) for block in layers for name, size in SIZES.items()}
    assert after.keys() == before.keys() | bases | shapes.keys()
    assert differing(before, {name: after[name] for name in before}) == []
    assert differing(bare, {name: after[name] for name in bare}) == []
    assert {name: tuple(after[name].shape) for name in shapes} == shapes
    assert {after[name].dtype for name in bases | shapes.keys()} == {torch.bfloat16}


def test_with_the_identity_nothing_but_base_and_order(odd, words: Path, tmp_path: Path) -> None:
    """``align`` without a curvature: no tensor for one."""
    for method, added in (("namex-full", {"base_expert"}), ("smear", set())):
        source, out = odd("deepseek", torch.bfloat16, tokenizer=True), tmp_path / method
        report = patch_checkpoint(source, out, recipe_on(words, align="activations", method=method))
        names = read_tensors(out).keys() - read_tensors(source).keys()
        assert {name.split(".")[4] for name in names} == added
        assert all("explained" not in layer for layer in report.layers)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("qwen2_moe", {"base": "shared"}),
        ("deepseek", {"base": "first", "every": 2, **MOMENTUM}),
        ("deepseek", {"method": "camex", "base": "index:4", "align": "weights"}),
    ],
)
def test_base_experts_walk_among_aligned_experts(odd, words: Path, tmp_path: Path, family: str, fields: Any) -> None:
    """Each the float64 reference's on the reordered experts, rounded once; on the original's order it is another."""
    source = odd(family, torch.float32, tokenizer=True)
    patch_checkpoint(source, tmp_path / "out", recipe_on(words, **CURVED, **fields))
    written = read_tensors(tmp_path / "out")
    for folder, same in ((plain(source, tmp_path / "out"), True), (source, False)):
        found = []
        for layer, base in base_experts(folder, fields).items():
            for name in PROJECTIONS:
                try:
                    assert_rounded(written[f"model.layers.{layer}.mlp.base_expert.{name}.weight"], base[name])
                    found.append(True)
                except AssertionError:
                    found.append(False)
        assert all(found) == same


class Told:
    """A layer of the original and of the result, by transformers' own forward passes over the calibration text."""

    def __init__(self, source: Path, out: Path, text: torch.Tensor, calibrate: str) -> None:
        self.text, self.calibrate = text, calibrate
        self.original, self.patched, self.plain = load(source), load(out), plain(source, out)

    @torch.no_grad()
    def read(self, layer: int) -> None:
        """Inputs of the layer's experts, and what the original's and the result's say to them."""
        inputs = block_inputs(self.patched if self.calibrate == "after" else self.original, layer, self.text)
        self.wanted, self.index, self.value = block_output(self.original, layer, inputs)
        block = self.patched.model.layers[layer].mlp
        given: list[Any] = []
        handle = block.register_forward_pre_hook(lambda module, arguments: given.append(arguments))
        self.patched(self.text, use_cache=False)
        handle.remove()
        ((_, token_ids, segments, _),) = given
        self.found = block.routed(inputs.flatten(0, 1), token_ids, segments, None).view(inputs.shape)
        self.inputs = double(inputs.flatten(0, 1))
        self.experts = experts_at(self.plain, layer)

    def curvature(self, rank: int, ridge: float) -> tuple[dict[str, np.ndarray], list[float]]:
        """What is stored of it, with V V^T in the place of V, and the share of energy that the directions explain."""
        mine: list[tuple[np.ndarray, np.ndarray]] = []
        for expert in range(7):
            token, place = map(np.asarray, (self.index == expert).nonzero(as_tuple=True))
            mine.append((self.inputs[token], double(self.value)[token, place]))
        mass = np.array([gate.sum() for _, gate in mine])
        usage, explained = mass / mass.sum(), []
        result = {"usage": usage}
        for kind in ("input", "neuron"):
            energies, spans, rests = [], [], []
            for expert, (x, gate) in enumerate(mine):
                x = x if kind == "input" else neurons64(x, {n: self.experts[n][expert] for n in PROJECTIONS})
                values, vectors = np.linalg.eigh((x * gate[:, None] ** 2).T @ x / mass[expert])
                energies.append(values[-rank:])
                spans.append(vectors[:, -rank:])
                rests.append(values[:-rank].mean())
            columns = len(spans[0])
            whole = sum(p * (e.sum() + (columns - rank) * r) for p, e, r in zip(usage, energies, rests, strict=True))
            floors = np.array(rests) + ridge * whole / columns
            result[f"{kind}_floor"] = floors / (usage @ floors)
            parts = zip(spans, energies, rests, floors, strict=True)
            result[f"{kind}_directions"] = np.stack([(v * ((e - r) / f)) @ v.T for v, e, r, f in parts])
            explained.append(sum(p * e.sum() for p, e in zip(usage, energies, strict=True)) / whole)
        return result, explained


def stored_curvature(tensors: Tensors, layer: int) -> dict[str, np.ndarray]:
    """With V V^T in the place of V, of which signs and mixtures are arbitrary."""
    found = {name: double(tensors[f"model.layers.{layer}.mlp.curvature.{name}"]) for name in SIZES}
    return {name: v @ v.transpose(0, 2, 1) if name.endswith("directions") else v for name, v in found.items()}


def farthest(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The largest relative distance between two tensors of a name."""
    assert one.keys() == other.keys()
    return max(float(np.linalg.norm(one[name] - other[name]) / np.linalg.norm(other[name])) for name in one)


@pytest.mark.parametrize(
    ("family", "changes", "fields"),
    [
        ("qwen2_moe", {}, {}),
        ("qwen2_moe", {}, {"method": "smear", "rank": 1}),
        ("deepseek", {}, {"method": "camex", "base": "mean", "align": "none", "ridge": 0.1}),
        ("deepseek", {"norm_topk_prob": True}, {"rank": 2, "eta": 0.5, "routing_span": "previous", **MOMENTUM}),
    ],
    ids=["qwen", "qwen-smear", "deepseek-camex", "deepseek-renormalised"],
)
@pytest.mark.parametrize("calibrate", ["after", "before"])
def test_what_is_stored_is_what_transformers_sees(odd, words: Path, tmp_path: Path, family, changes, fields, calibrate):
    """Curvature, errors, tokens and mass of every layer again, by hooks in transformers' own model on the same text,
    and in numpy's float64.

    ``after``: every layer's inputs are what the finished patched model has there; ``before``: what the original has.
    """
    source = odd(family, torch.float32, tokenizer=True, **changes)
    recipe = recipe_on(words, **CURVED, **fields, calibrate=calibrate)
    report = patch_checkpoint(source, tmp_path / "out", recipe)
    text = text_for(recipe, read_config(source), AutoTokenizer.from_pretrained(source))
    tensors, told = read_tensors(tmp_path / "out"), Told(source, tmp_path / "out", text.ids, calibrate)
    assert [layer["layer"] for layer in report.layers] == moe_layers(read_config(source))
    for record in report.layers:
        told.read(record["layer"])
        wanted, explained = told.curvature(recipe.to_dict()["rank"] or 0, recipe.to_dict()["ridge"])
        assert farthest(stored_curvature(tensors, record["layer"]), wanted) < 5e-3
        assert record["explained"] == pytest.approx(explained, abs=1e-3)
        assert all(0 < share < 1 for share in record["explained"])
        (error,) = record["errors"]
        assert error["stage"] == "soft"
        relative = float((told.found - told.wanted).square().sum() / told.wanted.square().sum())
        assert error["error"] == pytest.approx(relative, rel=2e-3)
        usage = [int((told.index == expert).sum()) for expert in range(7)]
        mass = [float(told.value[told.index == expert].sum()) for expert in range(7)]
        assert sum(abs(one - other) for one, other in zip(record["usage"], usage, strict=True)) <= 4  # ties
        assert record["mass"] == pytest.approx(mass, abs=1)
    told.calibrate = "before" if calibrate == "after" else "after"
    told.read(record["layer"])  # the last layer: what the other choice would have stored
    other, _ = told.curvature(recipe.to_dict()["rank"] or 0, recipe.to_dict()["ridge"])
    assert farthest(stored_curvature(tensors, record["layer"]), other) > 0.1


def test_long_texts_go_in_batches(odd, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole sequences, the last one smaller: the same numbers up to rounding."""
    source, recipe = odd("deepseek", torch.float32, tokenizer=True), recipe_on(words, **CURVED)
    results = []
    for tokens in (patched_blocks.BATCH_TOKENS, 200, 1):  # of sequences of 64
        monkeypatch.setattr(patched_blocks, "BATCH_TOKENS", tokens)
        report = patch_checkpoint(source, tmp_path / f"{tokens}", recipe)
        written, layers = read_tensors(tmp_path / f"{tokens}"), [layer["layer"] for layer in report.layers]
        stored = [stored_curvature(written, layer) for layer in layers]
        results.append(([layer["errors"][0]["error"] for layer in report.layers], stored))
    for errors, stored in results[1:]:
        assert errors == pytest.approx(results[0][0], rel=1e-4)
        assert all(farthest(one, other) < 1e-3 for one, other in zip(stored, results[0][1], strict=True))


GAMES = {
    "namex-full": ("agreement", (3, 7, 7)),
    "camex": ("own_base", (3, 7, 7)),
    "smear": (None, (1, 7, 7)),
}


@pytest.mark.parametrize("method", GAMES)
def test_the_report(odd, words: Path, tmp_path: Path, method: str) -> None:
    """What is written down about a layer, and the text by name, hash and length; no tensor of the result beside it."""
    source = odd("qwen2_moe", torch.bfloat16, tokenizer=True)
    recipe, (status, shape) = recipe_on(words, **CURVED, method=method), GAMES[method]
    report = patch_checkpoint(source, tmp_path / "out", recipe)
    text = text_for(recipe, read_config(source), AutoTokenizer.from_pretrained(source))
    assert report.run["calibration"] == {"name": "words.txt", "sha256": text.sha256, "tokens": TOKENS}
    assert json.loads((tmp_path / "out" / "namex/report.json").read_text()) == json.loads(report.to_json())
    statistics = load_file(tmp_path / "out" / "namex/statistics.safetensors")
    assert sorted(statistics) == sorted(f"layers.{n}.{what}" for n in (0, 2, 3) for what in ("cosines", "usage"))
    for record in report.layers:
        assert sum(record["usage"]) == 3 * TOKENS
        assert 0 < sum(record["mass"]) < TOKENS
        assert statistics[f"layers.{record['layer']}.usage"].tolist() == record["usage"]
        assert statistics[f"layers.{record['layer']}.cosines"].shape == shape
        assert [game["projections"] for game in record["games"]] == [[n] for n in PROJECTIONS if status]
        assert {game["status"] for game in record["games"]} == ({status} if status else set())
        assert record["seconds"] > 0
        assert record["bytes"] == 7 * 3 * 16 * 8 * 2


def test_cosines_without_a_base(odd, words: Path, tmp_path: Path) -> None:
    """SMEAR plays no game and has no base to compare with: cosines are of whole experts in their new order."""
    source = odd("deepseek", torch.float32, tokenizer=True)
    patch_checkpoint(source, tmp_path / "out", recipe_on(words, align="activations", method="smear"))
    for layer in (1, 2, 3):
        experts = experts_at(plain(source, tmp_path / "out"), layer)
        flat = np.concatenate([experts[name].reshape(7, -1) for name in PROJECTIONS], axis=1)
        flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
        (found,) = load_file(tmp_path / "out" / "namex/statistics.safetensors")[f"layers.{layer}.cosines"].numpy()
        assert found == pytest.approx(flat @ flat.T, abs=1e-5)


def test_the_games_are_those_of_the_aligned_experts(odd, words: Path, tmp_path: Path) -> None:
    """The report of a run without text on the experts in their new order says the same."""
    source, recipe = odd("deepseek", torch.float32, tokenizer=True), recipe_on(words, **CURVED, **MOMENTUM)
    report = patch_checkpoint(source, tmp_path / "out", recipe)
    again = patch_checkpoint(
        plain(source, tmp_path / "out"), tmp_path / "again", Recipe(merge="soft", segment=4, **MOMENTUM)
    )
    assert [layer["games"] for layer in report.layers] == [layer["games"] for layer in again.layers]
    assert report.totals["spectral_radius"] == again.totals["spectral_radius"]
    one, other = (load_file(tmp_path / name / "namex/statistics.safetensors") for name in ("out", "again"))
    assert differing({name: tensor for name, tensor in one.items() if "cosines" in name}, other) == []


@pytest.mark.parametrize(
    ("fields", "stages"), [(CURVED, ["aligned", "curvature"]), ({"align": "weights"}, ["aligned"])]
)
def test_progress_names_layer_and_stage(odd, words: Path, tmp_path: Path, fields: Any, stages: list[str]) -> None:
    """Long layers are followed stage by stage; bytes grow to those of the model, read and then copied."""
    told: list[tuple[str, int, int]] = []
    source = odd("qwen2_moe", torch.bfloat16, tokenizer=True)

    def note(event: ProgressEvent) -> None:
        told.append((str(event), event.done, event.total))

    patch_checkpoint(source, tmp_path / "out", recipe_on(words, **fields), progress=note)
    wanted = [
        line for n in (0, 2, 3) for line in (*(f"layer {n}: {stage}" for stage in ("read", *stages)), f"layer {n}")
    ]
    assert [what for what, _, _ in told if what not in ("checking", "copying")] == wanted
    assert [what for what, _, _ in told[-3:]] == ["copying"] * 3
    done = [done for _, done, _ in told]
    assert done == sorted(done)
    assert told[-1][1] == told[-1][2] == 2 * sum(tensor.nbytes for tensor in read_tensors(source).values())


SIZED: list[tuple[str, dict[str, Any]]] = [
    ("qwen-bf16", CURVES["namex-full"]),
    ("deepseek-fused-bf16", CURVES["smear"]),
    ("qwen-fused", CURVES["rank-3"]),
    ("deepseek-renormalised", CURVES["identity"]),
    ("qwen-bf16", {"align": "weights", "method": "smear"}),
]


@pytest.mark.parametrize(("form", "fields"), SIZED)
def test_sizes_are_known_before(odd, words: Path, tmp_path: Path, form: str, fields: dict[str, Any]) -> None:
    """The plan's bytes are those of the tensors; a layer's added tensors share a shard, a few layers fill it."""
    family, dtype, changes = FORMS[form]
    source, recipe = odd(family, dtype, tokenizer=True, **changes), recipe_on(words, **fields)
    whole = make_plan(resolve(str(source)), recipe, "5GB")
    sizes = [whole.added_bytes(layer) for layer in whole.shape.layers]
    for number, (size, packs) in enumerate(((sum(sizes), 1), (sum(sizes) - 1, 2), (max(1, sizes[0] - 1), 3))):
        if not sum(sizes):
            packs, size = 0, 1
        plan, out = make_plan(resolve(str(source)), recipe, size), tmp_path / str(number)
        patch_checkpoint(source, out, recipe, shard_size=size)
        tensors, weight_map = read_tensors(out), json.loads((out / INDEX).read_text())["weight_map"]
        assert plan.bytes_out == sum(tensor.nbytes for tensor in tensors.values())
        assert json.loads((out / INDEX).read_text())["metadata"]["total_size"] == plan.bytes_out
        assert len(list(out.glob("model-*.safetensors"))) == 3 + packs
        added = {n: t for n, t in tensors.items() if ".base_expert." in n or ".curvature." in n}
        assert plan.all_added_bytes == sum(tensor.nbytes for tensor in added.values())
        assert len({weight_map[name] for name in added}) == packs
        for layer in plan.shape.layers:
            own = [name for name in added if name.startswith(f"model.layers.{layer}.")]
            assert plan.added_bytes(layer) == sum(added[name].nbytes for name in own)
            assert len({weight_map[name] for name in own}) == min(packs, 1)


OPTIONS: dict[str, Any] = {"shard_size": "30KB"}


@pytest.fixture
def walking(words: Path) -> Recipe:
    """All that a base expert carries from layer to layer: itself, weights that are reused, momentum."""
    return recipe_on(words, **CURVED, **MOMENTUM, every=3, rank=2, calibration_tokens=256, segment=16)


def killed(source: Path, out: Path, recipe: Recipe, what: str, times: int = 1) -> None:
    """A run that is killed when it tells of ``what``; it leaves no model."""
    process = start(source, out, recipe, progress=Killing(what, times), **OPTIONS)
    process.join()
    assert process.exitcode == -9, f"the run was not killed: it ended with {process.exitcode}"
    is_no_model(out)


def layers_made(source: Path, out: Path, recipe: Recipe) -> list[int]:
    """Run in this process to the end; the layers that were read for it."""
    told: list[str] = []
    patch_checkpoint(source, out, recipe, progress=lambda event: told.append(str(event)), **OPTIONS)
    is_clean(out)
    return [int(what.split()[1].rstrip(":")) for what in told if what.endswith(": read")]


def test_killed_among_the_layers(long_checkpoint: Path, tmp_path: Path, walking: Recipe) -> None:
    """One moment after the other, one between a layer and the stream above it: all is as undisturbed."""
    out, earlier = tmp_path / "killed", tmp_path / "stream"
    stream = out / ".namex" / "arrived.safetensors"
    run(long_checkpoint, tmp_path / "undisturbed", walking, **OPTIONS)
    for what in ("checking", "layer 1: curvature", "layer 2", "layer 5: aligned", "layer 6"):
        killed(long_checkpoint, out, walking, what)
    shutil.copy(stream, earlier)
    killed(long_checkpoint, out, walking, "layer 7")
    shutil.copy(earlier, stream)
    assert (out / ".namex" / "layer-00007.safetensors").is_file()
    assert layers_made(long_checkpoint, out, walking) == list(range(7, 13))
    assert settled_files(out) == settled_files(tmp_path / "undisturbed")
    load_patched(out)
    one, other = (json.loads((folder / "namex/report.json").read_text()) for folder in (out, tmp_path / "undisturbed"))
    for layers in (one["layers"], other["layers"]):
        assert all(layer.pop("seconds") > 0 for layer in layers)
    assert one["layers"] == other["layers"]


def test_killed_among_the_shards(long_checkpoint: Path, tmp_path: Path, walking: Recipe) -> None:
    """Among those of the source and among those of added tensors: no layer is made again, and whole ones are kept."""
    out, lot = tmp_path / "killed", random.Random(4)
    run(long_checkpoint, tmp_path / "undisturbed", walking, **OPTIONS)
    killed(long_checkpoint, out, walking, "copying", 2)
    assert len(list(out.glob("model-*.safetensors"))) == 2
    killed(long_checkpoint, out, walking, "copying", 5)
    plan = make_plan(resolve(str(long_checkpoint)), walking, OPTIONS["shard_size"])
    state = sum(path.stat().st_size for path in (out / ".namex").iterdir())
    assert state <= space_needed(plan) - plan.bytes_out - MARGIN, "the disk may be too small for this run"
    made, begun = settled(out), tmp_path / "begun"
    shutil.copytree(out, begun)
    for shards in (1, 3):
        for _ in range(TRIES):
            if kill_after(start(long_checkpoint, out, walking, **OPTIONS), out, made + shards, lot):
                break
            shutil.rmtree(out)  # on a busy machine the signal may come when all is over: again
            shutil.copytree(begun, out)
    whole = {path.name: path.stat().st_mtime_ns for path in out.glob("model-*.safetensors")}
    assert len(whole) > 5
    assert layers_made(long_checkpoint, out, walking) == []
    assert settled_files(out) == settled_files(tmp_path / "undisturbed")
    assert whole.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("model-*.safetensors")}.items()


@pytest.mark.parametrize(("changes", "least"), [({}, 8), ({"moe_intermediate_size": 24}, 16)])
def test_a_rank_that_is_too_large(odd, words: Path, tmp_path: Path, changes: dict[str, Any], least: int) -> None:
    """It must be below both sizes of an expert's matrices: known before anything is read."""
    source = odd("deepseek", torch.float32, tokenizer=True, **changes)
    says = f"recipe field 'rank' is {least}; accepted here: from 1 below {least}"
    refused(source, tmp_path / "out", recipe_on(words, **CURVED, rank=least), RecipeError, says)
    model = load(source)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RecipeError, match=says):
        patch_model(model, recipe_on(words, **CURVED, rank=least), tokenizer=AutoTokenizer.from_pretrained(source))
    assert differing(before, model.state_dict()) == []
    assert model.config.model_type == "deepseek"
    most = recipe_on(words, **CURVED, rank=least - 1)
    patch_checkpoint(source, tmp_path / "out", most)
    assert differing(load(tmp_path / "out").state_dict(), live(source, most).state_dict()) == []


@pytest.mark.parametrize("fields", [CURVED, {"align": "weights"}])
def test_text_that_cannot_be_had(odd, words: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    recipe = recipe_on(words, **fields)
    for family in FAMILIES:
        bare = odd(family, torch.bfloat16)
        refused(bare, tmp_path / "out", recipe, CalibrationError, "model has no tokenizer, and this recipe reads")
        with pytest.raises(CalibrationError, match="patch_model needs tokenizer="):
            patch_model(load(bare), recipe)
    source = odd("deepseek", torch.bfloat16, tokenizer=True)
    nowhere = recipe_on(tmp_path / "no.txt", **fields)
    refused(source, tmp_path / "out", nowhere, CalibrationError, "no such file or folder")


@pytest.mark.parametrize("method", ["namex-full", "camex", "smear"])
@pytest.mark.parametrize("align", ["none", "weights", "activations"])
def test_damage(odd, words: Path, tmp_path: Path, method: str, align: str) -> None:
    """Also in the last layer, when others are finished; an expert's tensor, or any other, is named."""
    lot = random.Random(f"{method} {align}")
    for name in (
        *(f"model.layers.3.mlp.experts.{lot.randrange(7)}.{projection}.weight" for projection in PROJECTIONS),
        "model.layers.2.mlp.gate.weight",
    ):
        value, folder = lot.choice([float("nan"), float("inf")]), tmp_path / name
        shutil.copytree(odd("deepseek", torch.float32, shards=1, tokenizer=True), folder)
        rewrite_tensors(folder, lambda tensors, name=name, value=value: tensors[name][1].fill_(value))
        recipe = recipe_on(words, **CURVED, method=method, align=align)
        refused(folder, tmp_path / "out", recipe, CheckpointError, f"tensor {name} in model.safetensors holds NaN")


@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_without_shared_dtype(words: Path, tmp_path: Path, layout: str) -> None:
    """Routers and norms in float32 beside experts in bfloat16, as checkpoints have them."""
    config = odd_config("qwen2_moe", torch.bfloat16)
    tensors = toy_tensors(config, torch.bfloat16)
    tensors = {n: t.float() if "norm" in n or "mlp.gate." in n else t for n, t in tensors.items()}
    source = write_folder(tmp_path / "in", config, fused(config, tensors) if layout == "fused" else tensors, 2)
    add_tokenizer(source)
    patch_checkpoint(source, tmp_path / "out", recipe_on(words, **CURVED))
    written = read_tensors(tmp_path / "out")
    assert written["model.layers.0.mlp.gate.weight"].dtype == torch.float32
    added = [tensor for name, tensor in written.items() if ".curvature." in name or ".base_expert." in name]
    assert {tensor.dtype for tensor in added} == {torch.bfloat16}
    load(tmp_path / "out")
