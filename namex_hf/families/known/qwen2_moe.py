"""Qwen1.5-MoE and Qwen2-MoE: by default every layer is an MoE layer; one shared expert with a sigmoid gate."""

from ..family import Config, Family
from ..gate import stated

ATTENTION = ("full_attention", "sliding_attention")


def refuse(config: Config) -> str | None:
    dense, kinds, depth = config.get("mlp_only_layers") or [], config.get("layer_types"), config["num_hidden_layers"]
    if not isinstance(dense, list) or not all(type(layer) is int and 0 <= layer < depth for layer in dense):
        return f"'mlp_only_layers' is {dense!r}; accepted: a list of layer numbers from 0 to {depth - 1}"
    if kinds is not None and not (
        isinstance(kinds, list) and len(kinds) == depth and all(kind in ATTENTION for kind in kinds)
    ):
        return f"'layer_types' is {kinds!r}; accepted: for each of {depth} layers one of {', '.join(ATTENTION)}"
    return None


FAMILY = Family(
    model_type="qwen2_moe",
    gate=stated,
    shared_name="shared_expert",
    shared_gate_name="shared_expert_gate",
    needs=("shared_expert_intermediate_size",),
    optional={"decoder_sparse_step": 1},
    refuse=refuse,
    patched_type="namex_qwen2_moe",
    unties=True,  # llama.cpp needs lm_head.weight
)
