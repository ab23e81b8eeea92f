"""Qwen1.5-MoE and Qwen2-MoE: every layer a mixture by default, one shared expert behind a sigmoid gate."""

from .family import Config, Family


def moe_layers(config: Config) -> tuple[int, ...]:
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    return tuple(i for i in range(config["num_hidden_layers"]) if i not in dense and (i + 1) % step == 0)


def refuse(config: Config) -> str | None:
    dense = config.get("mlp_only_layers") or []
    if isinstance(dense, list) and all(type(layer) is int for layer in dense):
        return None
    return f"'mlp_only_layers' is {dense!r}; accepted: a list of layer numbers"


FAMILY = Family(
    model_type="qwen2_moe",
    patched_type="namex_qwen2_moe",
    experts_field="num_experts",
    shared_name="shared_expert",
    shared_gate_name="shared_expert_gate",
    moe_layers=moe_layers,
    shared_width=lambda config: config["shared_expert_intermediate_size"],
    needs=("shared_expert_intermediate_size",),
    optional={"decoder_sparse_step": 1},
    refuse=refuse,
    unties=True,  # llama.cpp asks for lm_head.weight
)
