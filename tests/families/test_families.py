"""Families: names, shapes, and what a configuration must hold. One row a family."""

from dataclasses import dataclass
from typing import Any

import pytest

from namex_hf.errors import FamilyError
from namex_hf.families import FAMILIES, Family, family_of
from namex_hf.families.outline import outline_of
from namex_hf.merging.experts import PROJECTIONS


@dataclass
class Row:
    """A small configuration, and what it should be read as."""

    config: dict[str, Any]
    layers: tuple[int, ...]
    experts: int
    shared_width: int
    shared: str
    shared_gate: str | None
    patched: str
    counts: tuple[str, ...]  # fields that must be whole numbers from 1
    optional: dict[str, int]  # fields that may be absent, with the least value


ROWS = {
    "qwen2_moe": Row(
        {
            "model_type": "qwen2_moe",
            "hidden_size": 32,
            "moe_intermediate_size": 12,
            "num_hidden_layers": 6,
            "num_experts": 10,
            "num_experts_per_tok": 4,
            "shared_expert_intermediate_size": 48,
            "mlp_only_layers": [3],
            "decoder_sparse_step": 2,
        },
        layers=(1, 5),
        experts=10,
        shared_width=48,
        shared="shared_expert",
        shared_gate="shared_expert_gate",
        patched="namex_qwen2_moe",
        counts=(
            "hidden_size",
            "moe_intermediate_size",
            "num_hidden_layers",
            "num_experts",
            "num_experts_per_tok",
            "shared_expert_intermediate_size",
        ),
        optional={"decoder_sparse_step": 1},
    ),
    "deepseek": Row(
        {
            "model_type": "deepseek",
            "hidden_size": 32,
            "moe_intermediate_size": 12,
            "num_hidden_layers": 7,
            "num_attention_heads": 4,
            "n_routed_experts": 10,
            "n_shared_experts": 2,
            "num_experts_per_tok": 4,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 2,
        },
        layers=(2, 4, 6),
        experts=10,
        shared_width=24,
        shared="shared_experts",
        shared_gate=None,
        patched="namex_deepseek",
        counts=(
            "hidden_size",
            "moe_intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "n_routed_experts",
            "n_shared_experts",
            "num_experts_per_tok",
        ),
        optional={"first_k_dense_replace": 0, "moe_layer_freq": 1},
    ),
}
NOT_A_COUNT = [None, 0, -1, 1.5, "8", True, [8]]


def rows() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def read(config: dict[str, Any]) -> tuple[Family, Any]:
    outline = outline_of(config)
    return outline.family, outline.shape


@rows()
def test_numbers(row: Row):
    family, shape = read(row.config)
    assert (shape.layers, shape.experts, shape.top_k) == (row.layers, row.experts, 4)
    assert (shape.hidden, shape.width, shape.shared_width) == (32, 12, row.shared_width)
    assert shape.of("gate_proj") == shape.of("up_proj") == (12, 32)
    assert shape.of("down_proj") == (32, 12)
    assert family.patched_type == row.patched


@rows()
def test_names(row: Row):
    outline, layer = outline_of(row.config), row.layers[0]
    block = f"model.layers.{layer}.mlp"
    assert outline.expert(layer, 7, "up_proj") == f"{block}.experts.7.up_proj.weight"
    assert outline.fused(layer, "gate_up_proj") == f"{block}.experts.gate_up_proj"
    assert outline.file(outline.router(layer)) == outline.router(layer) == f"{block}.gate.weight"
    assert outline.router_norm(layer) == f"model.layers.{layer}.post_attention_layernorm.weight"
    gate = {"gate": f"{block}.{row.shared_gate}.weight"} if row.shared_gate else {}
    assert outline.shared(layer) == {name: f"{block}.{row.shared}.{name}.weight" for name in PROJECTIONS} | gate
    assert outline.added(layer, "base", "gate_proj") == f"{block}.base_expert.gate_proj.weight"
    assert outline.bias(layer) is None


@rows()
def test_top_k_renormalises_when_the_configuration_says_so(row: Row):
    assert not read(row.config)[1].renormalises
    assert not read({**row.config, "norm_topk_prob": False})[1].renormalises
    assert read({**row.config, "norm_topk_prob": True})[1].renormalises


@rows()
def test_optional_fields_may_be_absent(row: Row):
    config = {name: value for name, value in row.config.items() if name not in (*row.optional, "mlp_only_layers")}
    assert read(config)[1].layers == tuple(range(config["num_hidden_layers"]))


COUNTS = [(family, name) for family, row in ROWS.items() for name in row.counts]
OPTIONAL = [(family, name, least) for family, row in ROWS.items() for name, least in row.optional.items()]


@pytest.mark.parametrize(("family", "name"), COUNTS)
def test_counts_that_are_missing_or_none_are_named(family: str, name: str):
    config = dict(ROWS[family].config)
    del config[name]
    with pytest.raises(FamilyError, match=rf"config\.json: '{name}' is None; {family} needs a whole number from 1"):
        read(config)
    for value in NOT_A_COUNT:
        with pytest.raises(FamilyError) as error:
            read({**config, name: value})
        assert f"'{name}' is {value!r}" in str(error.value)


@pytest.mark.parametrize(("family", "name", "least"), OPTIONAL)
def test_optional_fields_are_whole_numbers_where_they_stand(family: str, name: str, least: int):
    for value in (None, least - 1, 1.5, "1", True, [1]):
        with pytest.raises(FamilyError) as error:
            read({**ROWS[family].config, name: value})
        assert f"'{name}' is {value!r}; {family} needs a whole number from {least}" in str(error.value)


@pytest.mark.parametrize("value", [3, "3", {"3": 1}, ["3"], [True]])
def test_dense_layers_of_qwen_are_a_list_of_numbers(value: Any):
    with pytest.raises(FamilyError, match="'mlp_only_layers' is"):
        read({**ROWS["qwen2_moe"].config, "mlp_only_layers": value})
    for nothing in (None, []):
        assert read({**ROWS["qwen2_moe"].config, "mlp_only_layers": nothing})[1].layers == (1, 3, 5)


@rows()
def test_more_chosen_than_there_are(row: Row):
    with pytest.raises(FamilyError, match="'num_experts_per_tok' is 11, above"):
        read({**row.config, "num_experts_per_tok": 11})


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("qwen2_moe", {"mlp_only_layers": [1, 3, 5]}),
        ("qwen2_moe", {"decoder_sparse_step": 7}),
        ("deepseek", {"first_k_dense_replace": 7}),
    ],
)
def test_a_model_without_any_moe_layer(family: str, change: dict[str, Any]):
    with pytest.raises(FamilyError, match="no layer is a mixture of experts"):
        read({**ROWS[family].config, **change})


@pytest.mark.parametrize("found", ["llama", "mistral", "", None, [], {}, 3])
def test_unsupported_families_are_answered_with_the_supported_ones(found: Any):
    with pytest.raises(FamilyError) as error:
        family_of({"model_type": found})
    assert f"model_type {found!r}" in str(error.value)
    assert ", ".join(sorted(FAMILIES)) in str(error.value)
    with pytest.raises(FamilyError, match="model_type None"):
        family_of({})


@rows()
def test_a_patched_model_is_refused_as_such(row: Row):
    with pytest.raises(FamilyError, match=f"'{row.patched}': this model is patched already"):
        family_of({**row.config, "model_type": row.patched})


def test_deepseek_with_another_scoring_is_another_family():
    with pytest.raises(FamilyError, match="'scoring_func' is 'sigmoid'"):
        read({**ROWS["deepseek"].config, "scoring_func": "sigmoid"})


def test_deepseek_in_the_form_of_qwen():
    config = {
        **ROWS["deepseek"].config,
        "aux_loss_alpha": 0.003,
        "seq_aux": True,
        "scoring_func": "softmax",
        "ep_size": 1,
        "pretraining_tp": 1,
        "attention_bias": False,
        "vocab_size": 99,
    }
    form = FAMILIES["deepseek"].as_qwen2_moe
    assert form is not None
    new = form.config(config)
    assert new["model_type"] == "qwen2_moe"
    assert new["architectures"] == ["Qwen2MoeForCausalLM"]
    assert new["mlp_only_layers"] == [0, 1, 3, 5]
    assert (new["num_experts"], new["shared_expert_intermediate_size"]) == (10, 24)
    assert (new["router_aux_loss_coef"], new["norm_topk_prob"], new["qkv_bias"]) == (0.003, False, True)
    assert (new["vocab_size"], new["num_experts_per_tok"]) == (99, 4)
    gone = "n_routed_experts n_shared_experts first_k_dense_replace moe_layer_freq aux_loss_alpha seq_aux scoring_func"
    assert not set(gone.split()) & set(new)
    assert "attention_bias" not in new
    old, seen = outline_of(config), outline_of(new)
    assert (seen.shape, seen.family.model_type) == (old.shape, "qwen2_moe")
    for projection in PROJECTIONS:
        name = old.shared(2)[projection]
        assert form.rename(name) == seen.shared(2)[projection]
        assert form.doubled(name) == (projection == "down_proj")
    assert form.rename(old.expert(2, 3, "up_proj")) == seen.expert(2, 3, "up_proj")
    assert not form.doubled(old.expert(2, 3, "down_proj"))


@pytest.mark.parametrize(
    ("change", "rows_of"),
    [({}, (32, 32)), ({"num_key_value_heads": 2}, (32, 16)), ({"head_dim": 16, "num_key_value_heads": None}, (64, 64))],
)
def test_tensors_that_the_form_of_qwen_adds(change: dict[str, Any], rows_of: tuple[int, int]):
    form, config = FAMILIES["deepseek"].as_qwen2_moe, {**ROWS["deepseek"].config, **change}
    assert form is not None
    constants = form.constants(config)
    assert all((one.value, one.value_in_float16) == (1e-20, 6e-8) for name, one in constants.items() if "gate" in name)
    assert all(one.value == one.value_in_float16 == 0 for name, one in constants.items() if "gate" not in name)
    shapes = {name: one.shape for name, one in constants.items()}
    gates = {name: shape for name, shape in shapes.items() if "gate" in name}
    assert gates == {f"model.layers.{layer}.mlp.shared_expert_gate.weight": (1, 32) for layer in (2, 4, 6)}
    biases = {name: shape for name, shape in shapes.items() if name not in gates}
    queries, keys = rows_of
    expected = {"q_proj": (queries,), "k_proj": (keys,), "v_proj": (keys,)}
    assert biases == {
        f"model.layers.{layer}.self_attn.{name}.bias": shape for layer in range(7) for name, shape in expected.items()
    }


def test_biases_on_the_output_projection_have_no_place_in_qwen():
    form, config = FAMILIES["deepseek"].as_qwen2_moe, ROWS["deepseek"].config
    assert form is not None
    assert form.refuse(config) is form.refuse({**config, "attention_bias": False}) is None
    assert "'attention_bias' is true" in str(form.refuse({**config, "attention_bias": True}))
