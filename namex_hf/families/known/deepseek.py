"""DeepSeek-MoE v1: dense first layers, shared experts without a gate.

It can be written, bit for bit, as stock Qwen2-MoE. A shared-expert gate with weights near zero multiplies by 1/2, and a
doubled ``down_proj`` of the shared expert compensates for that. Loaders that expect Qwen's biases get zeros.
"""

from typing import Any

from ...merging.gate import Gate
from ..family import Config, Constant, Family, Reexpression

# Not zero: llama.cpp computes the sigmoid of x as silu(x) / x.
NEARLY_ZERO = {"value": 1e-20, "value_in_float16": 6e-8}


def moe_layers(config: Config) -> tuple[int, ...]:
    first, step = config.get("first_k_dense_replace", 0), config.get("moe_layer_freq", 1)
    return tuple(i for i in range(config["num_hidden_layers"]) if i >= first and i % step == 0)


def refuse(config: Config) -> str | None:
    for name in ("layer_types", "mlp_only_layers"):
        if config.get(name) is not None:
            return f"'{name}' is a field that DeepSeek-MoE v1 does not have; take it out"
    scoring = config.get("scoring_func", "softmax")
    return None if scoring == "softmax" else f"'scoring_func' is {scoring!r}; DeepSeek-MoE v1 has 'softmax'"


def renormalises(config: Config) -> bool:
    """`DeepseekConfig.renormalises` for a raw ``config.json``."""
    return bool(config.get("norm_topk_prob", False)) and config["num_experts_per_tok"] > 1


def as_qwen2_moe(config: Config) -> dict[str, Any]:
    """The configuration of the same model as Qwen2-MoE."""
    renamed = {
        "num_experts": config["n_routed_experts"],
        "shared_expert_intermediate_size": config["moe_intermediate_size"] * config["n_shared_experts"],
        "mlp_only_layers": sorted(set(range(config["num_hidden_layers"])) - set(moe_layers(config))),
        "decoder_sparse_step": 1,
        "router_aux_loss_coef": config.get("aux_loss_alpha", 0.001),
        "norm_topk_prob": renormalises(config),
        "qkv_bias": True,
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
    }
    translated = ("n_routed_experts", "n_shared_experts", "first_k_dense_replace", "moe_layer_freq", "aux_loss_alpha")
    removed = (*translated, "seq_aux", "scoring_func", "attention_bias", "pretraining_tp", "ep_size")
    return {name: value for name, value in config.items() if name not in removed} | renamed


def rename(name: str) -> str:
    return name.replace(".mlp.shared_experts.", ".mlp.shared_expert.")


def doubled(name: str) -> bool:
    return name.endswith(".mlp.shared_experts.down_proj.weight")


def constants(config: Config) -> dict[str, Constant]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    key_heads = config.get("num_key_value_heads") or heads
    gates = {
        f"model.layers.{i}.mlp.shared_expert_gate.weight": Constant((1, hidden), **NEARLY_ZERO)
        for i in moe_layers(config)
    }
    rows = {"q_proj": heads * head, "k_proj": key_heads * head, "v_proj": key_heads * head}
    biases = {
        f"model.layers.{i}.self_attn.{name}.bias": Constant((size,))
        for i in range(config["num_hidden_layers"])
        for name, size in rows.items()
    }
    return gates | biases


def refuse_as_qwen2_moe(config: Config) -> str | None:
    return "'attention_bias' is true; Qwen2-MoE has no bias on o_proj" if config.get("attention_bias") else None


def gate(config: Any) -> Gate:
    return Gate(config.num_experts_per_tok, renormalises=config.renormalises)


FAMILY = Family(
    model_type="deepseek",
    gate=gate,
    experts_field="n_routed_experts",
    shared_name="shared_experts",
    shared_count="n_shared_experts",
    needs=("n_shared_experts", "num_attention_heads"),
    optional={"first_k_dense_replace": 0, "moe_layer_freq": 1},
    refuse=refuse,
    patched_type="namex_deepseek",
    forms={"qwen2_moe": Reexpression(as_qwen2_moe, rename, doubled, constants, refuse_as_qwen2_moe)},
    unties=True,  # vLLM and SGLang do not tie the head of this class: its values would be random
)
