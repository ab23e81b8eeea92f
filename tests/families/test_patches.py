"""The published recipes against the true models: configurations as on the Hub, tensors of the true shapes, no bytes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from namex_hf.checkpoint.header import TensorSpan
from namex_hf.checkpoint.source import Checkpoint
from namex_hf.families.outline import outline_of
from namex_hf.patching.check import check_fit
from namex_hf.patching.estimate import peak_bytes, space_needed
from namex_hf.patching.plan import Plan, make_plan
from namex_hf.recipe import Recipe, read_yaml

TOP_K = "num_experts_per_tok"
ROWS = ("smoe", "ep-camex", "namex-full", "namex-full-mean")
PATCHES = Path(__file__).parents[2] / "patches"
FILES = sorted(PATCHES.glob("*/*.yaml"))
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen1.5-moe-a2.7b": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 5632,
        "max_position_embeddings": 8192,
        "max_window_layers": 21,
        "model_type": "qwen2_moe",
        "moe_intermediate_size": 1408,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 16,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 5632,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.39.0.dev0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "deepseek-moe-16b": {
        "architectures": ["DeepseekForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_deepseek.DeepseekConfig",
            "AutoModel": "modeling_deepseek.DeepseekModel",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
        },
        "aux_loss_alpha": 0.001,
        "bos_token_id": 100000,
        "eos_token_id": 100001,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 10944,
        "max_position_embeddings": 4096,
        "model_type": "deepseek",
        "moe_intermediate_size": 1408,
        "moe_layer_freq": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 28,
        "num_key_value_heads": 16,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000,
        "scoring_func": "softmax",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0",
        "use_cache": True,
        "vocab_size": 102400,
    },
}
EXPERT = 3 * 1408 * 2048 * 2  # bytes of a routed expert in bfloat16, in both
LAYERS = {"qwen1.5-moe-a2.7b": 24, "deepseek-moe-16b": 27}
EXPERTS = {"qwen1.5-moe-a2.7b": 60, "deepseek-moe-16b": 64}
TOTAL = {"qwen1.5-moe-a2.7b": 28.63e9, "deepseek-moe-16b": 32.75e9}
METHODS = ("namex-full", "namex-full-mean", "soft-namex-full", "namex", "ep-camex", "smoe")


def mlp(name: str, width: int) -> dict[str, tuple[int, ...]]:
    shapes = {"gate_proj": (width, 2048), "up_proj": (width, 2048), "down_proj": (2048, width)}
    return {f"{name}.{projection}.weight": shape for projection, shape in shapes.items()}


def tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the whole model as the Hub has it, layer by layer."""
    qwen = config["model_type"] == "qwen2_moe"
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], 2048)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        for projection in "qkvo":
            found[f"{name}.self_attn.{projection}_proj.weight"] = (2048, 2048)
            if qwen and projection != "o":
                found[f"{name}.self_attn.{projection}_proj.bias"] = (2048,)
        found |= {f"{name}.{norm}.weight": (2048,) for norm in ("input_layernorm", "post_attention_layernorm")}
        if not qwen and layer == 0:
            found |= mlp(f"{name}.mlp", 10944)
            continue
        experts = config["num_experts"] if qwen else config["n_routed_experts"]
        found[f"{name}.mlp.gate.weight"] = (experts, 2048)
        for expert in range(experts):
            found |= mlp(f"{name}.mlp.experts.{expert}", 1408)
        found |= mlp(f"{name}.mlp.shared_expert", 5632) if qwen else mlp(f"{name}.mlp.shared_experts", 2816)
        if qwen:
            found[f"{name}.mlp.shared_expert_gate.weight"] = (1, 2048)
    return found | {"model.norm.weight": (2048,), "lm_head.weight": (config["vocab_size"], 2048)}


def checkpoint(model: str) -> Checkpoint:
    """Shards of about 4 GB that are nowhere on a disk."""
    spans, place, number = {}, 0, 1
    for name, shape in tensors(CONFIGS[model]).items():
        span = TensorSpan(Path(f"/nowhere/model-{number:05d}.safetensors"), place, torch.bfloat16, shape)
        place += span.size
        spans[name] = span
        if place > 4e9:
            place, number = 0, number + 1
    shards = tuple(sorted({span.file for span in spans.values()}))
    return Checkpoint(Path("/nowhere"), CONFIGS[model], shards, spans, name=model, commit="0" * 40)


@pytest.fixture(scope="module")
def checkpoints() -> dict[str, Checkpoint]:
    return {model: checkpoint(model) for model in CONFIGS}


def patches() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("file", FILES, ids=[f"{file.parent.name}/{file.stem}" for file in FILES])


@pytest.fixture
def plan(file: Path, checkpoints: dict[str, Checkpoint]) -> Plan:
    return make_plan(checkpoints[file.parent.name], Recipe.from_yaml(file), "5GB", reads_text=False)


@pytest.mark.parametrize("model", CONFIGS)
def test_the_numbers_of_the_true_models(model: str, checkpoints: dict[str, Checkpoint]):
    config = CONFIGS[model]
    shape = outline_of(config).shape
    assert (shape.hidden, shape.width, shape.experts) == (2048, 1408, EXPERTS[model])
    assert len(shape.layers) == LAYERS[model]
    assert not shape.renormalises
    assert checkpoints[model].size == pytest.approx(TOTAL[model], rel=1e-3)
    if model == "deepseek-moe-16b":
        assert (shape.layers, shape.top_k, shape.shared_width) == (tuple(range(1, 28)), 6, 2 * 1408)
    else:
        assert (shape.layers, shape.top_k, shape.shared_width) == (tuple(range(24)), 4, 4 * 1408)


def test_every_model_has_every_recipe():
    assert {file.parent.name for file in FILES} == set(CONFIGS)
    for model, experts in EXPERTS.items():
        grouped = {f"grouped-{experts // 2}-{method}" for method in ("namex-full", "ep-camex", "fit-namex-full")}
        rows = {f"{routing}-{row}" for routing in ("cosine", "stable") for row in ROWS}
        assert {file.stem for file in FILES if file.parent.name == model} == {*METHODS, *grouped, *rows}


@patches()
def test_files_say_what_they_are(file: Path):
    first = file.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first) <= 160
    recipe, stated = Recipe.from_yaml(file), read_yaml(file)
    start = file.stem.split("-")[0]
    assert recipe.merge.kind == (start if start in ("grouped", "soft") else "residual")
    assert file.stem.removesuffix("-mean").endswith(recipe.merge.method)
    assert recipe.to_dict()["disagreement"] == ("mean" if file.stem.endswith("-mean") else "zero")
    assert stated == {name: value for name, value in recipe.to_dict().items() if name in stated}
    assert recipe.routing.kind == (start if start in ("cosine", "stable") else "linear")
    assert recipe.to_dict()["temperature"] == ("entropy" if start == "cosine" else None)
    assert stated.get("base") == (
        "shared" if recipe.merge.has_base else None
    )  # as the paper has it, whatever the default is


@patches()
def test_recipes_fit_the_true_configurations(file: Path):
    config = CONFIGS[file.parent.name]
    check_fit(Recipe.from_yaml(file), outline_of(config))


@patches()
def test_bytes_in_and_out(file: Path, plan: Plan):
    model = file.parent.name
    assert plan.checkpoint.size == pytest.approx(TOTAL[model], rel=1e-3)
    assert plan.layer_bytes(plan.shape.layers[0]) == EXPERTS[model] * EXPERT
    # Projection, embeddings and scale in bfloat16; indices of 4 bytes an id.
    experts, vocabulary, top_k = (CONFIGS[model][name] for name in (plan.family.experts_field, "vocab_size", TOP_K))
    routers = {"cosine": 2 * (experts * 2048 + experts**2 + 1), "stable": 4 * vocabulary * top_k, "linear": 0}
    added = routers[plan.recipe.routing.kind] + (EXPERT if plan.recipe.merge.has_base else 0)
    if file.stem.startswith("grouped"):
        gone, router_rows = LAYERS[model] * EXPERTS[model] // 2 * EXPERT, LAYERS[model] * EXPERTS[model] // 2 * 4096
        assert plan.bytes_out == plan.checkpoint.size - gone - router_rows
    else:
        assert plan.bytes_out == plan.checkpoint.size + LAYERS[model] * added
    assert plan.bytes_out <= space_needed(plan) < 1.1 * plan.checkpoint.size
    # Where layers aim at the original's hidden states, these go along with the text, beside what is wanted of a layer.
    aim = 2 * 4 * plan.recipe.calibration.tokens * 2048 if plan.recipe.to_dict()["target"] == "model" else 0
    assert peak_bytes(plan) < (6e9 + aim if plan.recipe.needs_text else 2.2 * plan.layer_bytes(plan.shape.layers[0]))


@patches()
def test_configurations_of_the_results(file: Path, plan: Plan):
    config, family = plan.config(), plan.family
    assert config["namex"] == plan.recipe.to_stored()
    assert config[family.experts_field] == plan.experts
    stays = file.stem.startswith("grouped") or file.stem == "smoe"
    assert config["model_type"] == (family.model_type if stays else family.patched_type)
    changed = {"namex", "model_type", "architectures", "auto_map", family.experts_field}
    for name, value in CONFIGS[file.parent.name].items():
        assert name in changed or config[name] == value


@pytest.mark.parametrize("experts", [1, 32, 64])
def test_deepseek_as_stock_qwen(experts: int, checkpoints: dict[str, Checkpoint]):
    recipe = Recipe(merge="grouped", experts=experts)
    plan = make_plan(checkpoints["deepseek-moe-16b"], recipe, "5GB", "qwen2_moe")
    shape = outline_of(plan.config()).shape
    assert (shape.layers, shape.experts, shape.top_k) == (tuple(range(1, 28)), experts, min(6, experts))
    assert shape.shared_width == 2816
    assert "auto_map" not in plan.config()
