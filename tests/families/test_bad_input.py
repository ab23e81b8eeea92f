"""Models without a family, quantised tensors, layers that are in no class, and configurations that are not those of
their tensors.
"""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from namex_hf import Recipe, patch_checkpoint
from namex_hf.checkpoint.resolve import resolve
from namex_hf.errors import CheckpointError, FamilyError, RecipeError
from namex_hf.families import FAMILIES
from namex_hf.patching.inspect import inspection
from tests.helpers.checkpoints import Tensors, change_config, read_config, read_tensors, rewrite_tensors
from tests.helpers.family_models import EXPERTS, LAYERS, add_prediction_layer, save_stock
from tests.helpers.recipes import recipe_of
from tests.helpers.runs import refused

RECIPE = Recipe(merge="grouped", experts=4)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model_type": "llama"}, "a dense model, without experts"),
        ({"model_type": "gpt_oss", "num_local_experts": 32}, "a mixture of experts"),
        ({"model_type": "qwen3_5_moe", "text_config": {"num_experts": 8}}, "reads more than text"),
        ({"model_type": "kimi_k2", "n_routed_experts": 8, "auto_map": {"AutoConfig": "a.B"}}, "code of its own, which"),
    ],
)
def test_a_model_without_a_family_is_answered_by_what_it_is(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    source = save_stock(tmp_path / "source", "olmoe")
    change_config(source, **{"num_experts": None, "num_experts_per_tok": None, **fields})
    with pytest.raises(FamilyError) as error:
        patch_checkpoint(source, tmp_path / "out", RECIPE)
    line = str(error.value)
    assert line.startswith(f"model_type {fields['model_type']!r} is not a supported family")
    assert all(part in line for part in (says, ", ".join(sorted(FAMILIES)), "docs/families.md says how to add"))
    assert "\n" not in line
    assert not (tmp_path / "out").exists()


PROJECTION = "model.layers.1.mlp.experts.3.up_proj.weight"


def to_fp8(tensors: Tensors) -> None:
    tensors[PROJECTION] = tensors[PROJECTION].to(torch.float8_e4m3fn)
    tensors[f"{PROJECTION}_scale_inv"] = torch.ones(1, 1)


def test_quantised_tensors_are_refused_by_name(tmp_path: Path) -> None:
    source = save_stock(tmp_path / "source", "qwen3_moe")
    rewrite_tensors(source, to_fp8)
    says = rf"^tensor {PROJECTION} is torch\.float8_e4m3fn; accepted: .* \(quantised"
    refused(source, tmp_path / "out", RECIPE, CheckpointError, says)


def test_a_configuration_of_quantised_tensors_is_refused(tmp_path: Path) -> None:
    source = save_stock(tmp_path / "source", "qwen3_moe")
    change_config(source, quantization_config={"quant_method": "gptq", "bits": 4})
    says = r"config\.json: 'quantization_config' is 'gptq'; accepted: none"
    refused(source, tmp_path / "out", RECIPE, CheckpointError, says)


def test_no_sum_makes_up_for_the_layers_below(tmp_path: Path, words: Path) -> None:
    """FlexOLMo's experts are followed by a norm."""
    source = save_stock(tmp_path / "source", "flex_olmo")
    recipe = recipe_of(words, {"merge": "grouped", "experts": 4, "fit": "router", "target": "model"})
    refused(source, tmp_path / "out", recipe, RecipeError, "'target' is 'model'; in flex_olmo .* accepted here: layer$")


@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3"])
def test_a_prediction_layer_is_left_out(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    source = save_stock(tmp_path / "source", name)
    alone = read_tensors(source).keys()
    added = add_prediction_layer(source)
    assert f"model.layers.{LAYERS}.mlp.experts.9.down_proj.weight" in added
    line = "left out, since the model's class does not have them: "
    assert inspection(resolve(str(source)))["other tensors"].startswith(line)
    with caplog.at_level(logging.WARNING, "namex_hf"):
        patch_checkpoint(source, tmp_path / "out", Recipe(merge="grouped", experts=EXPERTS))
    assert [record.message for record in caplog.records if record.message.startswith(line)]
    assert read_tensors(tmp_path / "out").keys() == alone
    assert read_config(tmp_path / "out")["num_nextn_predict_layers"] == 0
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("qwen3_moe", {"num_local_experts": 6, "num_experts": 10}, "is expert [6-9]; config.json counts 6 experts"),
        ("mixtral", {"num_local_experts": 10, "num_experts": 6}, "is expert [6-9]; config.json counts 6 experts"),
        ("mixtral", {"num_local_experts": 12}, r"experts\.1[01]\.w[123]\.weight is missing; config\.json counts 12"),
        ("mixtral", {"intermediate_size": 24}, r"is \[32, 20\]; config\.json makes it \[32, 24\]"),
        ("mixtral", {"num_hidden_layers": 5}, r"model\.layers\.4\..* is missing"),
        ("deepseek_v3", {"first_k_dense_replace": 0}, r"layers\.0\.mlp\.experts\.0\.gate_proj\.weight is missing"),
        ("deepseek_v3", {"first_k_dense_replace": 2}, "belongs to layer 1, which config.json does not make a MoE lay"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 2}, "belongs to layer 1, which config.json"),
    ],
)
def test_a_configuration_that_is_not_that_of_its_tensors(
    tmp_path: Path, name: str, fields: dict[str, Any], says: str
) -> None:
    source = save_stock(tmp_path / "source", name)
    change_config(source, **fields)
    refused(source, tmp_path / "out", RECIPE, CheckpointError, says)


def test_a_missing_correction_bias(tmp_path: Path) -> None:
    source, name = save_stock(tmp_path / "source", "ernie4_5_moe"), "mlp.moe_statics.e_score_correction_bias"
    rewrite_tensors(source, lambda tensors: tensors.pop(f"model.layers.2.{name}"))
    refused(source, tmp_path / "out", RECIPE, CheckpointError, rf"tensor model\.layers\.2\.{name} is missing")


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("hunyuan_v1_moe", {"moe_topk": [3, 2, 3, 3]}, r"'moe_topk' is \[3, 2, 3, 3\]; hunyuan_v1_moe needs a whole"),
        ("hunyuan_v1_moe", {"num_experts": [EXPERTS] * LAYERS}, "no model of type 'hunyuan_v1_moe' can be built"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "'topk_method' is 'noaux_tc'; accepted: greedy, group_limited_gr"),
        ("mixtral", {"num_experts_per_tok": 11}, "'num_experts_per_tok' is 11, above 'num_local_experts' = 10"),
    ],
)
def test_fields_that_a_family_does_not_take(tmp_path: Path, name: str, fields: dict[str, Any], says: str) -> None:
    source = save_stock(tmp_path / "source", name)
    change_config(source, **fields)
    refused(source, tmp_path / "out", RECIPE, FamilyError, says)


@pytest.mark.parametrize("name", ["deepseek_v3", "jamba"])
def test_fewer_experts_than_a_router_needs(tmp_path: Path, name: str) -> None:
    source = save_stock(tmp_path / "source", name)
    one = Recipe(merge="grouped", experts=1)
    refused(source, tmp_path / "out", one, RecipeError, "'experts' is 1; this model has 10 a layer; accepted: from 2 t")
