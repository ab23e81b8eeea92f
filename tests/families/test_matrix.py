"""What holds for every family. A family joins by a row of `tests/helpers/family_models.py`."""

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, gelu
from transformers import AutoModelForCausalLM, AutoTokenizer

from namex_hf import Recipe, patch_checkpoint, patch_model
from namex_hf.calibration.decoder import Decoder
from namex_hf.commands import patch
from namex_hf.errors import FamilyError, RecipeError
from namex_hf.families import FAMILIES
from namex_hf.families.check import check_block
from namex_hf.families.outline import Outline, outline_of
from namex_hf.files import STATISTICS
from namex_hf.patching.text import text_for
from namex_hf.progress import ProgressEvent
from namex_hf.record import Report
from tests.helpers.checkpoints import aligned, differing, read_config, read_tensors, settled_files
from tests.helpers.family_models import (
    EXPERTS,
    HUB_FORMS,
    LAYERS,
    ROWS,
    TOP_K,
    Removed,
    Row,
    bias_of,
    router_of,
    save_stock,
    stock_model,
)
from tests.helpers.recipes import Fields, recipe_of
from tests.helpers.runs import live, load
from tests.helpers.toy_models import add_tokenizer

FEWER: Fields = {"merge": "grouped", "experts": 4}
RECIPES: dict[str, Fields] = {
    "plain": {"merge": "grouped", "experts": TOP_K - 1},
    "router": {**FEWER, "fit": "router", "error_weights": "sequence"},
    "layer": {**FEWER, "fit": "layer"},
    "kept": {
        "merge": "grouped",
        "experts": EXPERTS - 2,
        "operator": "keep",
        "grouping": "none",
        "weighting": "saliency",
    },
    "narrow": {"merge": "narrow", "width": 8},
    "narrow, layer": {"merge": "narrow", "width": 8, "fit": "layer"},
}
IDS = torch.randint(3, 53, (3, 12), generator=torch.Generator().manual_seed(1))
OWN_CLASS: dict[str, Fields] = {
    "residual": {},
    "soft": {"merge": "soft"},
    "cosine": {**FEWER, "routing": "cosine"},
    "stable": {**FEWER, "routing": "stable"},
    "budget": {**FEWER, "budget": "damage", "fit": "router"},
}


@dataclass
class Family:
    """A family at work: its model, in memory and in a folder, and results, each made once."""

    name: str
    folder: Path
    words: Path
    reports: dict[str, Report] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)

    @property
    def row(self) -> Row:
        return ROWS[self.name]

    @cached_property
    def source(self) -> Path:
        return with_tokenizer(save_stock(self.folder / "source", self.name))

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_config(self.source)

    @cached_property
    def outline(self) -> Outline:
        return outline_of(self.config)

    def recipe(self, kind: str) -> Recipe:
        return recipe_of(self.words, RECIPES[kind])

    def result(self, kind: str) -> Path:
        out, told = self.folder / kind, []
        if kind not in self.reports:
            self.reports[kind] = patch_checkpoint(
                self.source, out, self.recipe(kind), shard_size="20KB", progress=told.append
            )
            self.events[kind] = len(told)
        return out


def with_tokenizer(folder: Path) -> Path:
    add_tokenizer(folder)
    return folder


def rows(*names: str) -> pytest.MarkDecorator:
    """Every family, or those of some rows."""
    marked = [pytest.param(n, marks=() if ROWS[n].usual else pytest.mark.all_families) for n in names or ROWS]
    return pytest.mark.parametrize("family", marked, indirect=True, scope="module")


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest, words: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    return Family(request.param, tmp_path_factory.mktemp(request.param), words)


def opened(folder: Path, like: Any) -> Any:
    """A folder as its users open it: all tensors are there and fit, and the class is that of the original."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(model) is type(like)
    return aligned(model.eval())


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Relative to the largest number."""
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def test_every_family_has_a_row() -> None:
    assert {row.model_type for row in ROWS.values()} == set(FAMILIES)
    assert {"mixtral", "deepseek_v3"} <= {name for name, row in ROWS.items() if row.usual} < ROWS.keys()


@rows()
def test_gate_and_experts_are_those_of_the_class(family: Family) -> None:
    check_block(family.config, family.outline)


WRONG_GATES: dict[str, Fields] = {
    "fewer": {"top_k": TOP_K - 1},
    "scale": {"scale": 1.3},
    "in groups": {"groups": 5, "kept_groups": 1},
    "other square root": {"score": "sqrtsoftplus"},
}


def wrong_outlines(outline: Outline) -> dict[str, Outline]:
    """Outlines whose gates or experts are not those of the class."""
    gate, shape = outline.shape.gate, outline.shape
    changes = dict(WRONG_GATES)
    changes["sum"] = {"renormalises": not gate.renormalises}
    changes["score"] = {"score": "sigmoid" if gate.score == "softmax" else "softmax"}
    if gate.kept_groups < gate.groups:
        changes |= {"no groups": {"groups": 1}, "best": {"best": 3 - gate.best}}
    wrong = {
        what: replace(outline, shape=replace(shape, gate=replace(gate, **fields))) for what, fields in changes.items()
    }
    if outline.family.bias:
        wrong["bias"] = replace(outline, family=replace(outline.family, bias="gate.other_bias"))
    return wrong


@rows()
def test_another_gate_is_found_out(family: Family) -> None:
    wrong = wrong_outlines(family.outline)
    assert ("bias" in wrong) == (bias_of(stock_model(family.name), LAYERS - 1) is not None)
    assert ("best" in wrong) == bool(family.row.lifted)
    for what, outline in wrong.items():
        with pytest.raises(FamilyError, match="gate values of the class") as error:
            check_block(family.config, outline)
        assert family.row.model_type in str(error.value), what


@rows()
@torch.no_grad()
def test_norm_and_shared_expert_are_those_of_the_class(family: Family) -> None:
    """What the router reads is the norm's input over its size, times the norm's weight plus the offset."""
    model, outline, layer = stock_model(family.name), family.outline, LAYERS - 1
    state, block, seen = model.state_dict(), outline.blocks[LAYERS - 1], {}
    shared = {name for name in state if name.startswith(f"{block}.shared")}
    assert set(outline.shared(layer).values()) == shared
    name = outline.router_norm(layer)
    assert (name is None) == (family.name == "flex_olmo")
    if name is None:
        return
    norm = model.get_submodule(name.removesuffix(".weight"))
    norm.register_forward_hook(lambda module, given, output: seen.update(norm=given[0]))
    model.get_submodule(block).register_forward_pre_hook(lambda module, given: seen.update(block=given[0]))
    model(IDS)
    relative = seen["norm"] / seen["norm"].square().mean(-1, keepdim=True).sqrt()
    assert close(relative * (state[name] + outline.family.norm_offset), seen["block"], 1e-4)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("deepseek_v3", {"norm_topk_prob": False}),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
        ("deepseek_v3", {"n_group": 5, "topk_group": 2, "routed_scaling_factor": 1.0}),
        ("deepseek_v2_group", {"n_group": 5, "topk_group": 2}),
        ("deepseek_v2_group", {"topk_method": "greedy"}),
        ("lfm2_moe", {"use_expert_bias": False}),
        ("lfm2_moe", {"norm_topk_prob": False, "routed_scaling_factor": 2.0}),
        ("jamba", {"num_experts_per_tok": 1}),
        ("qwen2_moe", {"num_experts_per_tok": 1, "norm_topk_prob": True}),
    ],
)
def test_gates_follow_the_configuration(name: str, fields: Fields) -> None:
    config = stock_model(name, **fields).config.to_dict()
    outline = outline_of(config)
    check_block(config, outline)
    assert (outline.bias(LAYERS - 1) is None) == (bias_of(stock_model(name, **fields), LAYERS - 1) is None)


@rows()
def test_another_activation_is_found_out(family: Family) -> None:
    with pytest.raises(FamilyError, match="outputs of experts of the class"):
        check_block(family.config, replace(family.outline, activation=gelu))


def through(decoder: Decoder, model: Any, outline: Outline, index: int, hidden: torch.Tensor) -> torch.Tensor:
    """A layer's output, over its input, with what the model's own experts answer."""
    with decoder.layer(index) as layer:
        tapped = layer.tap(hidden) if layer.is_mixture else None
        if tapped is None:
            return layer.forward(hidden)
    experts = model.get_submodule(outline.blocks[index]).experts
    decoder.pass_on(index, hidden, experts(tapped.inputs, tapped.index, tapped.value))
    return hidden


@rows()
@torch.no_grad()
def test_layerwise_pass_is_the_own_forward_pass(family: Family) -> None:
    """Each layer by itself to 1e-6, all one after the other to 1e-5 (a recurrence enlarges roundings), and the loss."""
    model, outline, own = stock_model(family.name), family.outline, []
    for path in outline.decoder_layers:
        model.get_submodule(path).register_forward_hook(
            lambda module, given, output: own.append((given[0].clone(), output.clone()))
        )
    expected = model(IDS, use_cache=False).logits
    assert len(own) == LAYERS
    decoder = Decoder(family.config, outline, model.state_dict().__getitem__)
    decoder.check(IDS)
    hidden = decoder.embed(IDS)
    assert close(hidden, own[0][0], 1e-6)
    for index, (before, after) in enumerate(own):
        through(decoder, model, outline, index, hidden)
        assert close(through(decoder, model, outline, index, before), after, 1e-6), f"layer {index}"
        assert close(hidden, after, 1e-5), f"layer {index}"
    loss = cross_entropy(expected[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert decoder.losses([hidden], IDS) == [pytest.approx(float(loss), rel=1e-5)]


@rows()
def test_as_many_experts_are_the_same_model(family: Family, tmp_path: Path) -> None:
    patch_checkpoint(family.source, tmp_path / "out", Recipe(merge="grouped", experts=EXPERTS))
    original = stock_model(family.name)
    assert close(logits(opened(tmp_path / "out", original)), logits(original), 1e-4)


@rows()
@torch.no_grad()
def test_two_experts_fewer_are_the_masked_model(family: Family) -> None:
    """In which groups of experts do not count any more."""
    folder, original = family.result("kept"), stock_model(family.name, **family.row.lifted)
    removed = {}
    for record in family.reports["kept"].layers:
        gone = sorted(set(range(EXPERTS)) - set(record["kept"]))
        assert len(gone) == 2
        removed[router_of(original, record["layer"]).data_ptr()] = gone
        if (bias := bias_of(original, record["layer"])) is not None:
            bias[..., gone] = -1e9
    with Removed(removed) as mask:
        expected = logits(original)
    assert mask.met == removed.keys()
    assert close(logits(opened(folder, original)), expected, 1e-4)
    assert not close(logits(stock_model(family.name, **family.row.lifted)), expected, 1e-2)


@rows()
@torch.no_grad()
def test_narrower_experts_are_those_with_silent_neurons(family: Family) -> None:
    """The original whose other neurons reach nothing; gates and ups are its own, bit for bit."""
    if not family.outline.family.narrows:
        with pytest.raises(RecipeError, match="what works: --merge grouped --experts"):
            family.result("narrow")
        return
    original = stock_model(family.name)
    narrow = opened(family.result("narrow"), original)
    statistics = load_file(family.result("narrow") / STATISTICS)
    for layer, block in family.outline.blocks.items():
        own, fewer = (model.get_submodule(f"{block}.experts") for model in (original, narrow))
        down = torch.zeros_like(own.down_proj)
        for expert, stay in enumerate(statistics[f"layers.{layer}.neurons"]):
            halves = own.gate_up_proj[expert].chunk(2)
            assert torch.equal(torch.cat([half[stay] for half in halves]), fewer.gate_up_proj[expert])
            down[expert][:, stay] = fewer.down_proj[expert]
        own.down_proj.copy_(down)
    assert close(logits(narrow), logits(original), 1e-4)
    assert not close(logits(narrow), logits(stock_model(family.name)), 1e-4)


@rows()
@pytest.mark.parametrize("kind", ["plain", "kept"])
def test_configuration_of_a_result(family: Family, kind: str) -> None:
    """Numbers of experts and groups, and nothing else."""
    count = RECIPES[kind]["experts"]
    expected = {**family.config, **family.row.lifted}
    expected |= dict(zip(family.row.counts, (count, min(count, TOP_K)), strict=True))
    expected |= {name: 0 for name in expected if name == "num_nextn_predict_layers" and expected[name]}
    found = read_config(family.result(kind))
    added = {"namex", "rope_theta", "rope_scaling", "auto_map", "tie_word_embeddings"}
    assert {n: v for n, v in found.items() if n not in added} == {n: v for n, v in expected.items() if n not in added}


@rows()
def test_correction_biases_are_means_of_their_groups(family: Family) -> None:
    """Plain ones without text; with text weighted by the members' gate values."""
    for kind in ("plain", "router"):
        result, model = read_tensors(family.result(kind)), stock_model(family.name)
        for record in family.reports[kind].layers:
            bias = bias_of(model, record["layer"])
            names = [n for n in result if f".layers.{record['layer']}." in n and n.endswith(("ction_bias", "ert_bias"))]
            assert len(names) == (bias is not None)
            if bias is None:
                continue
            mass = torch.tensor(record.get("mass", [1.0] * EXPERTS))
            shares = [mass[group] / mass[group].sum() for group in record["groups"]]
            expected = [
                float(share @ bias.flatten()[group]) for share, group in zip(shares, record["groups"], strict=True)
            ]
            assert result[names[0]].shape == (*bias.shape[:-1], len(expected))
            assert result[names[0]].flatten().tolist() == pytest.approx(expected, abs=1e-6)


@torch.no_grad()
def routed_output(model: Any, path: str, ids: torch.Tensor) -> torch.Tensor:
    """What the experts of a block add, ``[sequences, length, hidden]``."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(f"{path}.experts").register_forward_hook(
        lambda module, given, output: seen.append(output.reshape(*ids.shape, -1))
    )
    model(ids)
    handle.remove()
    return seen[0]


@rows()
def test_error_on_the_text_is_that_of_the_stock_model(family: Family) -> None:
    """Of the first MoE layer: fits and statistics route as the class does. All sequences weigh the same."""
    folder, original = family.result("router"), stock_model(family.name)
    text = text_for(family.recipe("router"), family.config, AutoTokenizer.from_pretrained(family.source))
    path = next(iter(family.outline.blocks.values()))
    target, output = (routed_output(model, path, text.ids) for model in (original, opened(folder, original)))
    weight = target.square().sum(2).mean(1).rsqrt()[:, None, None]
    errors = (weight * (output - target)).square().sum() / (weight * target).square().sum()
    assert family.reports["router"].layers[0]["errors"][-1]["error"] == pytest.approx(float(errors), rel=1e-3)


@rows()
@pytest.mark.parametrize("kind", ["plain", "router", "layer", "narrow, layer"])
def test_results_generate_and_train(family: Family, kind: str) -> None:
    if kind.startswith("narrow") and not family.outline.family.narrows:
        kind = "plain"
    model = opened(family.result(kind), stock_model(family.name))
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    cached, anew = (
        model.generate(IDS, max_new_tokens=5, do_sample=False, use_cache=cached) for cached in (True, False)
    )
    assert cached.shape == (3, 17)
    assert torch.equal(cached, anew)
    model.train()(IDS, labels=IDS).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    for layer, block in family.outline.blocks.items():
        assert gradients[f"{block}.experts.down_proj"].any(), layer
        assert gradients[f"{block}.{family.outline.family.router}"].any(), layer
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@rows()
@pytest.mark.parametrize("kind", ["plain", "router", "narrow"])
def test_disk_equals_memory(family: Family, kind: str) -> None:
    if kind == "narrow" and not family.outline.family.narrows:
        kind = "plain"
    stored, patched = opened(family.result(kind), stock_model(family.name)), live(family.source, family.recipe(kind))
    assert type(stored) is type(patched)
    held = [{**model.state_dict(), **dict(model.named_buffers())} for model in (stored, patched)]
    assert differing(*held) == []
    assert torch.equal(logits(stored), logits(patched))
    for name in family.row.counts:
        assert getattr(stored.config, name) == getattr(patched.config, name)


@rows()
def test_disk_equals_memory_in_half_precision(family: Family, tmp_path: Path) -> None:
    """Tensors that a class keeps in float32 stay so."""
    half = AutoModelForCausalLM.from_pretrained(family.source, dtype=torch.bfloat16)
    half.save_pretrained(source := tmp_path / "source")
    recipe = family.recipe("plain")
    patch_checkpoint(source, tmp_path / "out", recipe)
    before, after = read_tensors(source), read_tensors(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: before[name].dtype for name in after}
    assert torch.bfloat16 in {tensor.dtype for tensor in after.values()}
    stored, patched = load(tmp_path / "out"), patch_model(load(source), recipe)
    assert differing(stored.state_dict(), patched.state_dict()) == []


class Stop(BaseException):
    pass


@rows()
def test_a_stopped_run_goes_on_to_the_same_bytes(family: Family, tmp_path: Path) -> None:
    whole = settled_files(family.result("router"))
    left = family.events["router"] // 2

    def stop(_: ProgressEvent) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Stop

    run: Callable[..., Any] = patch_checkpoint
    options = {"recipe": family.recipe("router"), "shard_size": "20KB"}
    with pytest.raises(Stop):
        run(family.source, tmp_path / "out", progress=stop, **options)
    assert (tmp_path / "out" / ".namex").is_dir()
    run(family.source, tmp_path / "out", **options)
    assert settled_files(tmp_path / "out") == whole


def is_the_same_result(family: Family, source: Path, out: Path) -> None:
    original = stock_model(family.name)
    patch_checkpoint(source, out, family.recipe("router"))
    found, expected = (opened(folder, original).state_dict() for folder in (out, family.result("router")))
    assert differing(found, expected) == []


@rows()
def test_experts_in_the_tensors_of_the_class(family: Family, tmp_path: Path) -> None:
    source = with_tokenizer(save_stock(tmp_path / "source", family.name, fuse=True))
    assert any(name.endswith("experts.gate_up_proj") for name in read_tensors(source))
    is_the_same_result(family, source, tmp_path / "out")


@rows(*HUB_FORMS)
def test_forms_of_the_hub(family: Family, tmp_path: Path) -> None:
    """The same model under the names of the Hub; the result's numbers have the names that they have there."""
    for name, change in HUB_FORMS[family.name].items():
        source = with_tokenizer(save_stock(tmp_path / name / "source", family.name))
        change(source)
        is_the_same_result(family, source, tmp_path / name / "out")
        patch_checkpoint(source, tmp_path / name / "plain", Recipe(**RECIPES["plain"]))
        opened(tmp_path / name / "plain", stock_model(family.name))
        before, after = read_config(source), read_config(tmp_path / name / "plain")
        numbers = {EXPERTS: TOP_K - 1, TOP_K: TOP_K - 1}
        for counted in ("num_experts", "num_local_experts", "num_experts_per_tok"):
            assert after.get(counted) == numbers.get(before.get(counted))
        assert isinstance(after.get("moe_topk"), list) == (change.__name__ == "top_k_by_layer")


@rows(*(name for name in ROWS if name not in ("qwen2_moe", "deepseek")))
def test_what_needs_a_class_of_its_own_is_answered_by_what_works(family: Family, tmp_path: Path) -> None:
    commands = set()
    for what, fields in OWN_CLASS.items():
        recipe = recipe_of(family.words, fields)
        with pytest.raises(RecipeError) as error:
            patch_checkpoint(family.source, tmp_path / what, recipe)
        line = str(error.value)
        assert "\n" not in line
        assert not (tmp_path / what).exists()
        match = re.search(r"what works for \w+: (--keep 0.5|--merge grouped --experts \d+)$", line)
        assert match, line
        commands.add(match[1])
    (command,) = commands
    source = with_tokenizer(shutil.copytree(family.source, tmp_path / "source"))
    assert patch.main([str(source), "--out", str(tmp_path / "out"), "--quiet", *command.split()]) == 0
    opened(tmp_path / "out", stock_model(family.name))
