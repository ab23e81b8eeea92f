"""``merge: grouped``: which experts become one, what they become, and the stock checkpoints that come out."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from namex_hf import Recipe, patch_checkpoint
from namex_hf.errors import FamilyError
from tests.helpers.checkpoints import (
    PROJECTIONS,
    aligned,
    differing,
    experts_field,
    moe_layers,
    read_config,
    read_tensors,
    same_bits,
    write_folder,
)
from tests.helpers.reference import assert_rounded, average_linkage, double, experts_at, merged_group, routed_mass
from tests.helpers.toy_models import FAMILIES, VOCAB, odd_config, toy_tensors

TOKENS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))


def expert_name(layer: int, expert: int, projection: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"


ROWS: list[tuple[str, torch.dtype, dict[str, Any], dict[str, Any]]] = [
    ("qwen2_moe", torch.float32, {}, {"experts": 3}),
    ("deepseek", torch.bfloat16, {"n_routed_experts": 9, "fuse": True}, {"experts": 4}),
    ("deepseek", torch.float32, {}, {"experts": 2, "granularity": "expert", "disagreement": "mean"}),
    ("qwen2_moe", torch.bfloat16, {"norm_topk_prob": True}, {"experts": 3}),
    ("qwen2_moe", torch.float16, {}, {"experts": 2, "weighting": "uniform"}),
    ("deepseek", torch.float32, {}, {"experts": 1}),
    ("qwen2_moe", torch.float32, {}, {"experts": 1, "method": "ep-camex"}),
    ("deepseek", torch.bfloat16, {}, {"experts": 5, "disagreement": "mean"}),
]


@pytest.mark.parametrize(("family", "dtype", "changes", "recipe"), ROWS)
def test_merged_experts(odd, tmp_path: Path, family: str, dtype: torch.dtype, changes, recipe) -> None:
    """Groups, merged experts, router rows and mass factor against an independent float64 computation."""
    source = odd(family, dtype, **changes)
    report = patch_checkpoint(source, tmp_path / "out", Recipe(merge="grouped", **recipe))
    before, after = read_tensors(odd(family, dtype, **{**changes, "fuse": False})), read_tensors(tmp_path / "out")
    config = read_config(source)
    assert [layer["layer"] for layer in report.layers] == moe_layers(config)
    for record in report.layers:
        layer, groups, factor = record["layer"], record["groups"], record["mass_factor"]
        experts = experts_at(source, layer)
        assert sorted(groups) == average_linkage(experts, recipe["experts"])
        router = double(before[f"model.layers.{layer}.mlp.gate.weight"])
        rows = np.stack([router[members].mean(0) for members in groups])
        assert_rounded(after[f"model.layers.{layer}.mlp.gate.weight"], rows)
        check_factor(factor, config, before[f"model.layers.{layer}.post_attention_layernorm.weight"], router, rows)
        for expert, members in enumerate(groups):
            for name in PROJECTIONS:
                found = after[expert_name(layer, expert, name)]
                if len(members) == 1:
                    assert same_bits(found, before[expert_name(layer, members[0], name)])
                    continue
                wanted = merged_group(experts, members, recipe)[name]
                if name != "down_proj" or factor == 1:
                    assert_rounded(found, wanted)
                else:  # rounded twice: as the merged expert, and times the factor
                    once = double(torch.from_numpy(wanted).to(dtype))
                    assert_rounded(found, once * factor, roundings=3)


def check_factor(
    factor: float, config: dict[str, Any], norm: torch.Tensor, router: np.ndarray, rows: np.ndarray
) -> None:
    """The routed mass before over that after; 1 where top-k is renormalised."""
    if config["norm_topk_prob"]:
        assert factor == 1
        return
    top_k = config["num_experts_per_tok"]
    before = routed_mass(router, double(norm), top_k)
    after = routed_mass(rows, double(norm), min(top_k, len(rows)))
    assert factor == pytest.approx(before / after, rel=0.03)
    assert factor < 1


@pytest.mark.parametrize("family", FAMILIES)
def test_all_experts_kept_is_the_identity(odd, tmp_path: Path, family: str) -> None:
    """``experts: N``: every tensor byte for byte, also from fused input."""
    for source in (odd(family, torch.bfloat16), odd(family, torch.bfloat16, fuse=True)):
        out = tmp_path / source.parent.name
        patch_checkpoint(source, out, Recipe(merge="grouped", experts=7))
        assert differing(read_tensors(odd(family, torch.bfloat16)), read_tensors(out)) == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("experts", "top_k"), [(5, 3), (2, 2), (1, 1)])
def test_counts(odd, tmp_path: Path, family: str, experts: int, top_k: int) -> None:
    """The configuration counts what is there, and top-k is at most that; the rest of the tensors is untouched."""
    source = odd(family, torch.bfloat16)
    patch_checkpoint(source, tmp_path / "out", Recipe(merge="grouped", experts=experts))
    config, before, after = read_config(tmp_path / "out"), read_tensors(source), read_tensors(tmp_path / "out")
    assert config["model_type"] == family
    assert config[experts_field(config)] == experts
    assert config["num_experts_per_tok"] == top_k
    gone = {n for n in before if ".mlp.experts." in n or n.endswith(".mlp.gate.weight")}
    kept = {name: tensor for name, tensor in before.items() if name not in gone}
    assert differing(kept, {name: tensor for name, tensor in after.items() if name not in gone}) == []
    block = {expert_name(layer, e, p) for layer in moe_layers(config) for e in range(experts) for p in PROJECTIONS}
    assert {name for name in after if ".mlp.experts." in name} == block
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    with torch.no_grad():
        assert model(TOKENS).logits.isfinite().all()


def test_equal_experts_become_one_without_change(tmp_path: Path) -> None:
    """Copies of one expert: no game can be agreed on, plain averages stand in, and the average is the expert."""
    config = odd_config("qwen2_moe", torch.float32, norm_topk_prob=True)
    tensors = toy_tensors(config, torch.float32)
    for layer in moe_layers(config):
        for expert in range(1, 7):
            for name in PROJECTIONS:
                tensors[expert_name(layer, expert, name)] = tensors[expert_name(layer, 0, name)].clone()
    source = write_folder(tmp_path / "model", config, tensors)
    report = patch_checkpoint(source, tmp_path / "out", Recipe(merge="grouped", experts=2))
    after = read_tensors(tmp_path / "out")
    for layer in report.layers:
        assert sorted(index for group in layer["groups"] for index in group) == list(range(7))
        assert {game["status"] for game in layer["games"]} == {"uniform_fallback"}
        for expert in range(2):
            for name in PROJECTIONS:
                wanted = tensors[expert_name(layer["layer"], 0, name)]
                torch.testing.assert_close(after[expert_name(layer["layer"], expert, name)], wanted)


def test_shard_size(odd, tmp_path: Path) -> None:
    """Shards stay below the size unless one layer alone is larger; how they are cut changes no tensor."""
    source = odd("deepseek", torch.float32, num_hidden_layers=6)
    recipe = Recipe(merge="grouped", experts=4)
    patch_checkpoint(source, tmp_path / "one", recipe)
    assert [path.name for path in (tmp_path / "one").glob("model*.safetensors")] == ["model.safetensors"]
    layer = sum(t.nbytes for n, t in read_tensors(tmp_path / "one").items() if n.startswith("model.layers.3."))
    for number, size in enumerate((2 * layer + 500, f"{layer // 1000 + 1}KB", 10)):
        out = tmp_path / f"many{number}"
        patch_checkpoint(source, out, recipe, shard_size=size)
        assert differing(read_tensors(tmp_path / "one"), read_tensors(out)) == []
        files = [path.stat().st_size for path in out.glob("model-*.safetensors")]
        assert len(files) >= (3, 6, 9)[number]
        assert max(files) < max(2 * layer + 500 if number == 0 else 0, layer + 1000) + 10_000  # headers


def test_shard_size_of_base_experts(odd, tmp_path: Path) -> None:
    """``residual`` adds base experts in shards of that size; the source's own are carried over one to one."""
    source = odd("qwen2_moe", torch.float32, num_hidden_layers=6)
    patch_checkpoint(source, tmp_path / "one")
    patch_checkpoint(source, tmp_path / "many", shard_size=4000)
    assert len(list((tmp_path / "one").glob("model-*.safetensors"))) == 3 + 1
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) == 3 + 3  # 1536 bytes each, of five layers
    assert differing(read_tensors(tmp_path / "one"), read_tensors(tmp_path / "many")) == []


PLAIN = """
import sys
sys.modules["namex_hf"] = None  # whoever imports it gets an ImportError
import torch
from transformers import AutoModelForCausalLM
tokens, folders = torch.load(sys.argv[1]), sys.argv[2:]
for folder in folders:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert type(model).__module__.startswith("transformers.models.qwen2_moe"), type(model)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    for parameter in model.parameters():  # out of the mapped file: kernels round by how memory is aligned
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        torch.save(model.eval()(tokens).logits, folder + "/logits.pt")
"""


def test_export_as_qwen2_moe_opens_without_the_package(odd, tmp_path: Path) -> None:
    """A DeepSeek-MoE in the stock form: plain transformers opens it, and says bit for bit what the native form says."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    changes = {"num_hidden_layers": 5, "first_k_dense_replace": 2}
    for name, dtype in dtypes.items():
        source, recipe = odd("deepseek", dtype, **changes), Recipe(merge="grouped", experts=4)
        patch_checkpoint(source, tmp_path / f"native_{name}", recipe)
        patch_checkpoint(source, tmp_path / f"stock_{name}", recipe, export_as="qwen2_moe", shard_size="10KB")
        config = read_config(tmp_path / f"stock_{name}")
        assert config["model_type"] == "qwen2_moe"
        assert "auto_map" not in config
        assert not any(path.suffix == ".py" for path in (tmp_path / f"stock_{name}").iterdir())
    torch.save(TOKENS, tmp_path / "tokens.pt")
    folders = [str(tmp_path / f"stock_{name}") for name in dtypes]
    command = [sys.executable, "-I", "-c", PLAIN, str(tmp_path / "tokens.pt"), *folders]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in dtypes:
        native = aligned(AutoModelForCausalLM.from_pretrained(tmp_path / f"native_{name}", dtype="auto"))
        assert type(native).__name__ == "DeepseekForCausalLM"
        with torch.no_grad():
            assert same_bits(native.eval()(TOKENS).logits, torch.load(tmp_path / f"stock_{name}" / "logits.pt"))


def test_export_that_would_not_be_exact(odd, tmp_path: Path) -> None:
    """A bias that the stock form has no place for: refused, not dropped; the native form takes it."""
    source, recipe = odd("deepseek", torch.bfloat16, attention_bias=True), Recipe(merge="grouped", experts=4)
    with pytest.raises(FamilyError, match="attention_bias"):
        patch_checkpoint(source, tmp_path / "out", recipe, export_as="qwen2_moe")
    assert not (tmp_path / "out").exists()
    patch_checkpoint(source, tmp_path / "out", recipe)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["unexpected_keys"]


def test_statistics(odd, tmp_path: Path) -> None:
    """``namex/statistics.safetensors``: the cosines between whole experts of every layer."""
    from safetensors.torch import load_file

    source = odd("qwen2_moe", torch.float32)
    patch_checkpoint(source, tmp_path / "out", Recipe(merge="grouped", experts=3))
    statistics = load_file(tmp_path / "out" / "namex/statistics.safetensors")
    assert sorted(statistics) == ["layers.0.cosines", "layers.2.cosines", "layers.3.cosines"]
    for layer in (0, 2, 3):
        experts = experts_at(source, layer)
        flat = np.concatenate([experts[name].reshape(7, -1) for name in PROJECTIONS], axis=1)
        flat /= np.linalg.norm(flat, axis=1, keepdims=True)
        np.testing.assert_allclose(statistics[f"layers.{layer}.cosines"][0].numpy(), flat @ flat.T, atol=1e-5)


def test_report_is_plain_json(odd, tmp_path: Path) -> None:
    """``namex/report.json`` holds what the call returns."""
    report = patch_checkpoint(odd("deepseek", torch.bfloat16), tmp_path / "out", Recipe(merge="grouped", experts=3))
    assert json.loads((tmp_path / "out" / "namex/report.json").read_text()) == json.loads(report.to_json())
