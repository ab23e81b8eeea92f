"""The base expert of every layer, as written, against a float64 computation that shares no code with the package."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from namex_hf import Recipe, load_patched, patch_checkpoint, patch_model
from namex_hf.errors import FamilyError, RecipeError
from namex_hf.models.modeling_namex_deepseek import SoftDeepseekMoeBlock
from namex_hf.progress import ProgressEvent
from tests.helpers.checkpoints import PROJECTIONS, read_tensors, rewrite_tensors, settled_files
from tests.helpers.reference import assert_rounded, base_experts
from tests.helpers.toy_models import odd_checkpoint

ROWS: list[tuple[str, torch.dtype, dict[str, Any], dict[str, Any]]] = [
    ("qwen2_moe", torch.bfloat16, {}, {"base": "first"}),
    ("deepseek", torch.float32, {}, {}),
    ("deepseek", torch.bfloat16, {"shards": 4}, {"base": "shared", "gamma": 0.5}),
    ("qwen2_moe", torch.float16, {"num_experts": 9, "num_hidden_layers": 6}, {"granularity": "expert", "every": 2}),
    ("qwen2_moe", torch.float32, {}, {"granularity": "expert", "every": 2, "base": "first"}),
    ("qwen2_moe", torch.float32, {"num_hidden_layers": 6, "decoder_sparse_step": 2}, {"base": "index:4"}),
    ("deepseek", torch.float32, {"num_hidden_layers": 7, "moe_layer_freq": 2, "n_routed_experts": 9}, {"every": 3}),
    ("deepseek", torch.bfloat16, {"fuse": True}, {"disagreement": "mean", "base": "first"}),
    ("qwen2_moe", torch.float32, {}, {"disagreement": "mean", "granularity": "expert", "scale": "lemma"}),
    ("qwen2_moe", torch.float32, {"fuse": True, "shards": 2}, {"scale": "lemma", "gamma": 0.25, "base": "first"}),
    ("deepseek", torch.float32, {}, {"base": "mean"}),
    ("qwen2_moe", torch.float32, {"num_hidden_layers": 5}, {"method": "namex", "base": "shared"}),
    ("deepseek", torch.float16, {"num_hidden_layers": 5}, {"method": "namex", "granularity": "expert"}),
    ("deepseek", torch.float32, {}, {"method": "namex", "base": "first"}),
    ("deepseek", torch.float32, {"num_hidden_layers": 5}, {"method": "namex", "base": "mean"}),
    ("qwen2_moe", torch.float32, {"num_hidden_layers": 6}, {"every": 3, "base": "mean", "disagreement": "mean"}),
    ("qwen2_moe", torch.bfloat16, {"num_hidden_layers": 6}, {"method": "ep-camex", "base": "first"}),
    ("deepseek", torch.float32, {}, {"method": "ep-camex", "base": "mean", "gamma": 1.5}),
    ("qwen2_moe", torch.bfloat16, {"num_hidden_layers": 9, "mlp_only_layers": [1, 4]}, {"gamma": 0.7}),
    ("qwen2_moe", torch.float32, {"num_hidden_layers": 6}, {"momentum": "complex", "base": "first"}),
    ("deepseek", torch.float32, {"num_hidden_layers": 6}, {"momentum": "complex", "beta": "0.9,-0.5236", "gamma": 0.5}),
    ("deepseek", torch.bfloat16, {"num_hidden_layers": 6}, {"momentum": "quaternion", "method": "namex"}),
    ("qwen2_moe", torch.float32, {"num_hidden_layers": 6}, {"momentum": "quaternion", "method": "ep-camex"}),
    ("qwen2_moe", torch.bfloat16, {"shards": 4}, {"method": "camex"}),
    ("deepseek", torch.float32, {"fuse": True, "num_hidden_layers": 6, "moe_layer_freq": 2}, {"method": "camex"}),
    ("qwen2_moe", torch.float16, {"num_hidden_layers": 6}, {"method": "camex", "base": "mean"}),
    ("deepseek", torch.bfloat16, {}, {"method": "camex", "base": "index:4", "merge": "soft"}),
]


@pytest.mark.parametrize(("family", "dtype", "changes", "recipe"), ROWS)
def test_base_expert_of_every_layer(odd, tmp_path: Path, family: str, dtype: torch.dtype, changes, recipe) -> None:
    """``base_expert`` is the reference rounded to the dtype once: the walk itself is never rounded."""
    source = odd(family, dtype, **changes)
    patch_checkpoint(source, tmp_path / "out", Recipe(**recipe))
    written, wanted = read_tensors(tmp_path / "out"), base_experts(source, recipe)
    stored = {name for name in written if ".base_expert." in name}
    block = "model.layers.{}.mlp.base_expert.{}.weight"
    assert stored == {block.format(layer, name) for layer in wanted for name in PROJECTIONS}
    for layer, base in wanted.items():
        for name in PROJECTIONS:
            tensor = written[block.format(layer, name)]
            assert tensor.dtype == dtype
            assert_rounded(tensor, base[name])


def test_reference_would_notice(odd, tmp_path: Path) -> None:
    """The comparison is sharp: another base, step, point or game is told apart."""
    source = odd("deepseek", torch.float32)
    patch_checkpoint(source, tmp_path / "out", Recipe())
    written, last = read_tensors(tmp_path / "out"), "model.layers.3.mlp.base_expert.up_proj.weight"
    others = ({"base": "index:1"}, {"gamma": 0.999}, {"disagreement": "mean"}, {"granularity": "expert"})
    others += ({"momentum": "complex", "beta": "0.01"}, {"momentum": "complex", "beta": "0.5,1.5"})
    others += ({"method": "namex"}, {"method": "ep-camex"}, {"method": "camex"})
    for other in (*others, {"every": 2}, {"scale": "lemma"}):
        with pytest.raises(AssertionError):
            assert_rounded(written[last], base_experts(source, other)[3]["up_proj"])


def test_shared_expert_of_another_width(odd, tmp_path: Path) -> None:
    """A width that is no multiple of the routed one is refused where its slices would be the base, and there alone."""
    source = odd("qwen2_moe", torch.bfloat16, shared_expert_intermediate_size=20)
    for recipe in (Recipe(), Recipe(method="camex"), Recipe(merge="soft")):
        with pytest.raises(RecipeError, match="width 20 is no multiple of the routed width 8: choose another base"):
            patch_checkpoint(source, tmp_path / "none", recipe)
    others = (Recipe(base="first"), Recipe(merge="soft", method="smear"), Recipe(merge="grouped", experts=3))
    for number, recipe in enumerate((*others, Recipe(method="smoe"))):
        patch_checkpoint(source, tmp_path / str(number), recipe)


def test_no_agreement_carries_the_base_on(odd, tmp_path: Path) -> None:
    """Around the mean of all experts nobody can gain: the base stays, the report says why, and the walk goes on."""
    report = patch_checkpoint(odd("deepseek", torch.float32), tmp_path / "out", Recipe(base="mean"))
    first, second = report.layers[:2]
    assert {game["status"] for game in first["games"]} == {"no_agreement"}
    assert all(weight == 0 for game in first["games"] for weight in game["weights"])
    assert {game["status"] for game in second["games"]} == {"agreement"}
    tensors = read_tensors(tmp_path / "out")
    for name in PROJECTIONS:
        block = "model.layers.{}.mlp.base_expert.{}.weight"
        assert torch.equal(tensors[block.format(1, name)], tensors[block.format(2, name)])


def statuses(report) -> list[set[str]]:
    return [{game["status"] for game in layer["games"]} for layer in report.layers]


@pytest.mark.parametrize(
    ("point", "first", "weight"), [("zero", "no_agreement", 0), ("mean", "uniform_fallback", 1 / 7)]
)
def test_namex_around_the_mean_solves_in_the_second_layer(odd, tmp_path: Path, point, first, weight) -> None:
    """The weights of a game without agreement are not reused; those of the first agreement are."""
    source = odd("deepseek", torch.float32, num_hidden_layers=5)
    report = patch_checkpoint(source, tmp_path / "out", Recipe(method="namex", base="mean", disagreement=point))
    assert statuses(report) == [{first}, {"agreement"}, {"reused"}, {"reused"}]
    layers = [[game["weights"] for game in layer["games"]] for layer in report.layers]
    assert layers[0] == [pytest.approx([weight] * 7)] * 3
    assert layers[1] == layers[2] == layers[3] != layers[0]


@pytest.mark.parametrize("text", [False, True], ids=["weights", "text"])
def test_a_run_that_is_continued_reuses_no_fallback(odd, words: Path, tmp_path: Path, text: bool) -> None:
    """Stopped after a layer that fell back: the next one is solved, and the result is that of an undisturbed run."""
    source = odd("deepseek", torch.float32, tokenizer=True)
    fields = {"method": "namex", "base": "mean", "disagreement": "mean"}
    if text:
        fields |= {"merge": "soft", "align": "weights", "calibration_data": str(words), "calibration_tokens": 512}

    def stop(event: ProgressEvent) -> None:
        if str(event) == "layer 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        patch_checkpoint(source, tmp_path / "out", Recipe(**fields), progress=stop)
    state = tmp_path / "out/.namex/arrived.safetensors"
    assert not load_file(state)["weights"].any()
    report = patch_checkpoint(source, tmp_path / "out", Recipe(**fields))
    assert statuses(report) == [{"uniform_fallback"}, {"agreement"}, {"reused"}]
    patch_checkpoint(source, tmp_path / "undisturbed", Recipe(**fields))
    assert settled_files(tmp_path / "out") == settled_files(tmp_path / "undisturbed")


def test_report_tells_the_weights(odd, tmp_path: Path) -> None:
    """An expert taken as base has no stake; the others' shares sum to 1 and solve the bargaining equation."""
    report = patch_checkpoint(odd("qwen2_moe", torch.float32), tmp_path / "out", Recipe(base="index:2"))
    assert [layer["layer"] for layer in report.layers] == [0, 2, 3]
    assert [game["projections"] for game in report.layers[0]["games"]] == [[name] for name in PROJECTIONS]
    for layer in report.layers:
        for game in layer["games"]:
            assert game["status"] == "agreement"
            assert game["residual"] < 1e-8
            assert sum(game["weights"]) == pytest.approx(1)
            assert (game["weights"][2] == 0) == (layer["layer"] == 0)


def test_stability_is_reported(odd, tmp_path: Path) -> None:
    """The spectral radius of the walk with this momentum, and its power over the MoE layers; none without momentum."""
    source = odd("deepseek", torch.float32)
    report = patch_checkpoint(source, tmp_path / "steady", Recipe(momentum="complex"))
    assert report.totals["spectral_radius"] == pytest.approx(0.949, abs=1e-3)
    assert report.totals["spectral_radius_over_layers"] == pytest.approx(0.949 ** len(report.layers), abs=1e-2)
    report = patch_checkpoint(source, tmp_path / "growing", Recipe(momentum="quaternion"))
    assert report.totals["spectral_radius"] == pytest.approx(1.036, abs=1e-3)
    assert "spectral_radius" not in patch_checkpoint(source, tmp_path / "plain", Recipe()).totals


def test_convex_concave_procedure_is_asked(odd, tmp_path: Path) -> None:
    """Near the exact weights, as these games are easy, and not the exact solver's own."""
    pytest.importorskip("cvxpy", reason="the extra 'ccp' is not installed")
    source = odd("qwen2_moe", torch.float32)
    exact = patch_checkpoint(source, tmp_path / "exact", Recipe()).layers[-1]["games"][0]["weights"]
    recipe = Recipe(solver="ccp", ccp_iterations=20)
    game = patch_checkpoint(source, tmp_path / "ccp", recipe).layers[-1]["games"][0]
    assert 0 < max(abs(a - b) for a, b in zip(game["weights"], exact, strict=True)) < 1e-3


def test_soft_has_the_bases_of_residual_and_its_own_class(odd, tmp_path: Path) -> None:
    """The merge decides where the base acts, not what it is; the folder and the live model agree bit for bit."""
    source = odd("deepseek", torch.float32)
    patch_checkpoint(source, tmp_path / "residual", Recipe(base="shared"))
    recipe = Recipe(merge="soft", base="shared", segment=4, eta=0.5)
    patch_checkpoint(source, tmp_path / "soft", recipe)
    one, other = read_tensors(tmp_path / "residual"), read_tensors(tmp_path / "soft")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    loaded = load_patched(tmp_path / "soft")
    live = patch_model(AutoModelForCausalLM.from_pretrained(source), recipe)
    assert type(loaded.model.layers[1].mlp) is type(live.model.layers[1].mlp) is SoftDeepseekMoeBlock
    ids = torch.arange(2, 22)[None]
    for model in (loaded, live):
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # out of the file's mapping, whose alignment rounds otherwise
    assert torch.equal(loaded(input_ids=ids).logits, live(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek"])
@pytest.mark.parametrize(
    "fields", [{}, {"merge": "soft"}, {"base": "mean", "align": "weights", "merge": "soft"}], ids=str
)
def test_a_step_too_wide_for_the_dtype(tmp_path: Path, family: str, fields: dict) -> None:
    """The source is finite, so the result is, or there is none."""
    source = odd_checkpoint(tmp_path / "model", family, torch.float16, tokenizer=True)
    with pytest.raises(RecipeError, match=r"layer [23]: base\.\w+ of the result would hold .*float16.*gamma=100000\.0"):
        patch_checkpoint(source, tmp_path / "out", Recipe(gamma=1e5, **fields))
    assert not (tmp_path / "out").exists()
    model = AutoModelForCausalLM.from_pretrained(source)
    if "align" not in fields:
        with pytest.raises(RecipeError, match=r"layer [23]: base\.\w+ .*gamma=100000\.0"):
            patch_model(model, Recipe(gamma=1e5, **fields))


def test_a_sum_too_wide_for_the_dtype(tmp_path: Path) -> None:
    """The stock Qwen2-MoE form has twice DeepSeek's shared expert."""
    source = odd_checkpoint(tmp_path / "model", "deepseek", torch.float16, shards=1)
    name = "model.layers.1.mlp.shared_experts.down_proj.weight"
    rewrite_tensors(source, lambda tensors: tensors[name].view(-1)[0].fill_(40_000))
    with pytest.raises(FamilyError, match=f"twice {name}"):
        patch_checkpoint(source, tmp_path / "out", Recipe(merge="grouped", experts=3), export_as="qwen2_moe")
    assert not (tmp_path / "out").exists()
