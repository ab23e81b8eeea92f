"""What a class has, against what transformers saves and loads; whether a router renormalises, against the router."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from namex_hf import Recipe, patch_checkpoint
from namex_hf.errors import CheckpointError, FamilyError
from namex_hf.families.others import check_loading
from namex_hf.families.outline import TensorSpec, check_counts, outline_of
from namex_hf.merging.routing import route
from tests.helpers.checkpoints import read_tensors
from tests.helpers.toy_models import FAMILIES, odd_checkpoint, odd_config

RECIPES = {
    "residual": Recipe(),
    "cosine": Recipe(routing="cosine"),
    "soft": Recipe(merge="soft", curvature="kronecker"),
    "grouped": Recipe(merge="grouped", experts=3),
    "stable": Recipe(merge="soft", method="smear"),
}


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_outline_of_a_stock_model(tmp_path: Path, family: str, tied: bool) -> None:
    folder = odd_checkpoint(tmp_path / "model", family, tie_word_embeddings=tied)
    outline = outline_of(json.loads((folder / "config.json").read_text()))
    assert set(outline.tied) == ({"lm_head.weight", "model.embed_tokens.weight"} if tied else set())
    wanted = {name: tensor for name, tensor in outline.tensors.items() if not tied or name != "lm_head.weight"}
    assert wanted == shapes(read_tensors(folder))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_outline_of_a_patched_model(tmp_path: Path, family: str, recipe: str) -> None:
    """As transformers saves it again."""
    patch_checkpoint(odd_checkpoint(tmp_path / "model", family), tmp_path / "out", RECIPES[recipe])
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "saved")
    outline = outline_of(json.loads((tmp_path / "out/config.json").read_text()))
    assert dict(outline.tensors) == shapes(read_tensors(tmp_path / "saved")) == shapes(read_tensors(tmp_path / "out"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("stated", [True, False, None])
def test_renormalises_as_the_router_does(family: str, top_k: int, stated: bool | None) -> None:
    """Of one expert a token DeepSeek takes the probability as it is; Qwen2-MoE makes it 1."""
    config = odd_config(family, torch.float32, num_experts_per_tok=top_k, norm_topk_prob=stated)
    if stated is None:
        del config["norm_topk_prob"]
    shape = outline_of(config).shape
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_built(config))
    gate, inputs = model.model.layers[shape.layers[0]].mlp.gate, torch.randn(40, shape.hidden)
    torch.nn.init.normal_(gate.weight)
    with torch.no_grad():
        _, values, chosen = gate(inputs)
    found = route(inputs, gate.weight.detach(), shape.gate)
    assert shape.renormalises == (bool(stated) and (top_k > 1 or family == "qwen2_moe"))
    for token in range(len(inputs)):
        wanted = dict(zip(chosen[token].tolist(), values[token].tolist(), strict=True))
        assert dict(zip(found.index[token].tolist(), found.value[token].tolist(), strict=True)) == pytest.approx(wanted)


def _built(config: dict):
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))


@pytest.mark.parametrize("fields", [{}, {"merge": "grouped", "experts": 4, "export_as": "qwen2_moe"}], ids=str)
def test_one_expert_a_token_in_deepseek(tmp_path: Path, fields: dict) -> None:
    """``norm_topk_prob`` says nothing there: the same model, patched to the same function."""
    logits = []
    for stated in (True, False):
        source = odd_checkpoint(
            tmp_path / f"model-{stated}", "deepseek", torch.float32, num_experts_per_tok=1, norm_topk_prob=stated
        )
        recipe = {name: value for name, value in fields.items() if name != "export_as"}
        patch_checkpoint(source, tmp_path / f"out-{stated}", Recipe(**recipe), export_as=fields.get("export_as"))
        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(tmp_path / f"out-{stated}", dtype=torch.float32)
            logits.append(model(input_ids=torch.arange(50)[None]).logits)
    assert torch.equal(*logits)


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a family that is not described here."""
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=40,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("mixtral")
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def test_other_families(mixtral: Path) -> None:
    """One tensor after the other is taken away or cut, under its name on disk; a tied head need not be there."""
    found = shapes(read_tensors(mixtral))
    assert "lm_head.weight" not in found
    check_loading(mixtral, found | {"mtp.norm.weight": TensorSpec((3,), torch.float32)}, trust_remote_code=False)
    for name in ("model.norm.weight", "model.layers.1.self_attn.q_proj.weight"):
        with pytest.raises(CheckpointError, match=f"tensor {name} is missing"):
            check_loading(mixtral, {n: t for n, t in found.items() if n != name}, trust_remote_code=False)
        cut = {name: TensorSpec((2,) * len(found[name].shape), torch.float32)}
        with pytest.raises(CheckpointError, match=rf"tensor {name} is \[2"):
            check_loading(mixtral, found | cut, trust_remote_code=False)
    expert = next(name for name in found if ".experts.2." in name)
    with pytest.raises(CheckpointError, match=expert):
        check_loading(mixtral, {n: t for n, t in found.items() if n != expert}, trust_remote_code=False)


def test_what_cannot_be_built_is_left_to_loading(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    check_loading(tmp_path, {"a": TensorSpec((1,), torch.float32)}, trust_remote_code=False)


@pytest.mark.parametrize("name", ["num_hidden_layers", "n_layer", "num_local_experts", "n_routed_experts"])
def test_counts(name: str) -> None:
    found = {f"t{n}": TensorSpec((1500, 2), torch.float32) for n in range(1200)}
    most = 1500 if "expert" in name else 1200
    for config in ({name: most}, {name: 0}, {name: None}, {"other": 10**18}, {"hidden_size": 10**6}):
        check_counts(config, found)
    for config in ({name: most + 1}, {name: 10**18}, {name: -1}, {"text_config": {name: 10**18}}):
        with pytest.raises(FamilyError, match=f"'{name}' is .*from 0 to {most}"):
            check_counts(config, found)
