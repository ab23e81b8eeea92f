"""A tiny configuration of every family, and models of it: in memory, as transformers saves them, as the Hub has them.

A family is a row of `ROWS`. Nothing here shares code with the package: what a class reads is stated twice.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import namex_hf.models  # noqa: F401  transformers learns of DeepSeek
from tests.helpers.checkpoints import Tensors, change_config, read_config, rewrite_tensors

Fields = dict[str, Any]
EXPERTS, TOP_K, LAYERS, HIDDEN, WIDTH = 10, 3, 4, 32, 20
"""Twice the width is not the hidden size, so that no matrix can be taken for its transpose."""
COMMON: Fields = {
    "vocab_size": 96,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS: Fields = {"head_dim": 8}
LATENT: Fields = {
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
DELTA: Fields = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
WIDE: Fields = {"intermediate_size": WIDTH, "num_experts_per_tok": TOP_K}
"""Of families in which all layers are mixtures, with one width."""
NARROW: Fields = {"moe_intermediate_size": WIDTH, "num_experts_per_tok": TOP_K}
SIGMOID: Fields = {
    **NARROW,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
IN_GROUPS: Fields = {"n_group": 2, "topk_group": 1}
ONE_GROUP: Fields = {"n_group": 1, "topk_group": 1}
DENSE_FIRST: Fields = {"first_k_dense_replace": 1}


@dataclass(frozen=True)
class Row:
    """A family, or one of its forms."""

    model_type: str
    fields: Fields
    counts: tuple[str, str] = ("num_experts", "num_experts_per_tok")
    """Fields of ``config.json``, as transformers writes it, for the number of experts and of those that a token has."""
    lifted: Fields = field(default_factory=dict)
    """What ``config.json`` says in the place of groups of experts once there are fewer."""
    usual: bool = False
    """Whether it is the row of ``make test`` for its gate, layout, pass and companions."""


def row(model_type: str, *parts: Fields, **own: Any) -> Row:
    """Args: parts, fields of the configuration; own, of the row, or of the configuration."""
    of_row = {name: own.pop(name) for name in ("counts", "lifted", "usual") if name in own}
    fields = COMMON.copy()
    for part in (*parts, own):
        fields |= part
    return Row(model_type, fields, **of_row)


LOCAL = ("num_local_experts", "num_experts_per_tok")
ROUTED = ("n_routed_experts", "num_experts_per_tok")
GREEDY: Fields = {"n_group": 1, "topk_group": 1, "topk_method": "greedy"}
ROWS = {
    "qwen2_moe": row(
        "qwen2_moe", NARROW, num_experts=EXPERTS, shared_expert_intermediate_size=2 * WIDTH, mlp_only_layers=[0]
    ),
    "deepseek": row("deepseek", NARROW, DENSE_FIRST, n_routed_experts=EXPERTS, n_shared_experts=2, counts=ROUTED),
    "mixtral": row("mixtral", HEADS, WIDE, num_local_experts=EXPERTS, counts=LOCAL, usual=True),
    "olmoe": row("olmoe", WIDE, num_experts=EXPERTS),
    "qwen3_moe": row(
        "qwen3_moe",
        *(HEADS, NARROW),
        num_experts=EXPERTS,
        norm_topk_prob=True,
        mlp_only_layers=[0],
        counts=LOCAL,
        usual=True,
    ),
    "qwen3_next": row(
        "qwen3_next", HEADS, DELTA, NARROW, num_experts=EXPERTS, shared_expert_intermediate_size=24, mlp_only_layers=[]
    ),
    "qwen3_5_moe_text": row(
        "qwen3_5_moe_text",
        *(HEADS, DELTA, NARROW),
        num_experts=EXPERTS,
        shared_expert_intermediate_size=24,
        usual=True,
    ),
    "deepseek_v2": row(
        "deepseek_v2",
        *(LATENT, NARROW, DENSE_FIRST),
        n_routed_experts=EXPERTS,
        n_shared_experts=2,
        topk_method="greedy",
        routed_scaling_factor=1.0,
        counts=ROUTED,
    ),
    "deepseek_v2_group": row(
        "deepseek_v2",
        *(LATENT, NARROW, DENSE_FIRST, IN_GROUPS),
        n_routed_experts=EXPERTS,
        n_shared_experts=2,
        topk_method="group_limited_greedy",
        routed_scaling_factor=16.0,
        counts=ROUTED,
        lifted=GREEDY,
        usual=True,
    ),
    "deepseek_v3": row(
        "deepseek_v3",
        *(LATENT, SIGMOID, DENSE_FIRST, IN_GROUPS),
        num_mtp_layers=1,
        counts=ROUTED,
        lifted=ONE_GROUP,
        usual=True,
    ),
    "glm4_moe": row("glm4_moe", HEADS, SIGMOID, DENSE_FIRST, ONE_GROUP, counts=ROUTED),
    "glm4_moe_lite": row(
        "glm4_moe_lite",
        *(LATENT, SIGMOID, ONE_GROUP),
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        counts=ROUTED,
    ),
    "hunyuan_v1_moe": row(
        "hunyuan_v1_moe",
        HEADS,
        num_experts=EXPERTS,
        moe_topk=TOP_K,
        intermediate_size=WIDTH,
        counts=("num_experts", "moe_topk"),
        usual=True,
    ),
    "ernie4_5_moe": row(
        "ernie4_5_moe",
        moe_num_experts=EXPERTS,
        moe_k=TOP_K,
        moe_intermediate_size=WIDTH,
        moe_num_shared_experts=2,
        moe_layer_start_index=1,
        moe_layer_end_index=-1,
        moe_layer_interval=1,
        counts=("moe_num_experts", "moe_k"),
        usual=True,
    ),
    "dots1": row("dots1", HEADS, SIGMOID, DENSE_FIRST, ONE_GROUP, n_shared_experts=2, counts=ROUTED),
    "minimax_m2": row("minimax_m2", HEADS, WIDE, num_local_experts=EXPERTS, counts=LOCAL, usual=True),
    "lfm2_moe": row(
        "lfm2_moe",
        NARROW,
        num_experts=EXPERTS,
        num_dense_layers=1,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
        norm_topk_prob=True,
        use_expert_bias=True,
        usual=True,
    ),
    "jamba": row(
        "jamba",
        WIDE,
        num_experts=EXPERTS,
        expert_layer_period=2,
        expert_layer_offset=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        usual=True,
    ),
    "flex_olmo": row("flex_olmo", WIDE, num_experts=EXPERTS, usual=True),
    "mellum": row("mellum", HEADS, NARROW, num_experts=EXPERTS, norm_topk_prob=True, sliding_window=4, counts=LOCAL),
    "solar_open": row("solar_open", HEADS, SIGMOID, ONE_GROUP, counts=ROUTED),
}
"""By name: of the family, but for a second form of one."""
OTHERS = {
    "exaone_moe": row("exaone_moe", HEADS, NARROW, ONE_GROUP, num_experts=EXPERTS),
    "glm_moe_dsa": row(
        "glm_moe_dsa",
        *(LATENT, SIGMOID, ONE_GROUP),
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        index_topk=8,
        index_n_heads=2,
        index_head_dim=8,
        counts=ROUTED,
    ),
}
"""Of families that the package does not have."""


def stock_model(name: str, **changes: Any) -> Any:
    """A model in float32 on the CPU, every parameter and correction bias drawn anew; ``changes`` are fields."""
    row = (ROWS | OTHERS)[name]
    config = CONFIG_MAPPING[row.model_type](**row.fields | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        random = torch.randn(tensor.shape, generator=draw)
        if re.search(r"(correction|expert)_bias$", name):
            tensor.copy_(0.05 * random)
        elif tensor.ndim < 2 or name.endswith("A_log"):
            tensor.add_(0.1 * random)  # norms about one, others about what their class begins with
        elif re.search(r"\.(gate|router|wg)\.weight$", name):
            tensor.copy_(0.5 * random)  # large enough for choices to be decided
        else:
            tensor.copy_(random / tensor.shape[-1] ** 0.5)
    return model


def save_stock(folder: Path, name: str, *, fuse: bool = False, **changes: Any) -> Path:
    """A folder of `stock_model` as transformers writes it. Args: fuse, keep experts in the tensors of the class."""
    model = stock_model(name, **changes)
    model.save_pretrained(folder, save_original_format=not fuse)
    for code in folder.glob("*.py"):  # what our DeepSeek class leaves; a stock folder has none
        code.unlink()
    change_config(folder, auto_map=None)
    return folder


def count_by_other_name(folder: Path) -> None:
    """As the Hub has Qwen3-MoE."""
    count = read_config(folder)["num_local_experts"]
    change_config(folder, num_local_experts=None, num_experts=count)


def count_by_both_names(folder: Path) -> None:
    """With the field and its alias."""
    config = read_config(folder)
    count = config.get("num_local_experts") or config["num_experts"]
    change_config(folder, num_local_experts=count, num_experts=count)


def top_k_by_layer(folder: Path) -> None:
    """As the Hub has Hunyuan-A13B."""
    change_config(folder, moe_topk=[TOP_K] * LAYERS)


def below_language_model(folder: Path) -> None:
    """As the Hub has Qwen3.5-MoE, whose files hold a model of images too."""

    def rename(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("model.")]:
            tensors[name.replace("model.", "model.language_model.", 1)] = tensors.pop(name)

    rewrite_tensors(folder, rename)


Change = Callable[[Path], None]
HUB_FORMS: dict[str, dict[str, Change]] = {
    "qwen3_moe": {"other name": count_by_other_name, "both names": count_by_both_names},
    "mellum": {"other name": count_by_other_name},
    "mixtral": {"both names": count_by_both_names},
    "olmoe": {"both names": count_by_both_names},
    "hunyuan_v1_moe": {"list": top_k_by_layer},
    "qwen3_5_moe_text": {"prefix": below_language_model},
}
"""How a folder of a row is changed into one that the Hub may have."""


def add_prediction_layer(folder: Path) -> set[str]:
    """One layer that predicts the token after the next, behind the last, and the field that counts it; its names."""
    last, behind = f"model.layers.{LAYERS - 1}.", f"model.layers.{LAYERS}."
    new = {"eh_proj": (HIDDEN, 2 * HIDDEN), "enorm": (HIDDEN,), "hnorm": (HIDDEN,), "shared_head.norm": (HIDDEN,)}
    more: Tensors = {f"{behind}{name}.weight": torch.ones(shape) for name, shape in new.items()}

    def add(tensors: Tensors) -> None:
        more.update({name.replace(last, behind): tensor for name, tensor in tensors.items() if last in name})
        tensors.update({name: tensor.clone() for name, tensor in more.items()})

    rewrite_tensors(folder, add)
    change_config(folder, num_nextn_predict_layers=1)
    return set(more)


class Removed(TorchFunctionMode):
    """Within it routers give -1e9 for some experts, whatever their input is.

    Attributes:
        met: data pointers of the routers that were called.
    """

    def __init__(self, experts: dict[int, list[int]]) -> None:
        """Args: experts, numbers by the data pointer of a router's weight."""
        super().__init__()
        self.experts, self.met = experts, set[int]()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if function is torch.nn.functional.linear and args[1].data_ptr() in self.experts:
            self.met.add(args[1].data_ptr())
            output[..., self.experts[args[1].data_ptr()]] = -1e9
        return output


def router_of(model: Any, layer: int) -> torch.Tensor:
    """The weight of a layer's router: the one matrix with a row an expert."""
    found = [
        parameter
        for name, parameter in model.named_parameters()
        if f".layers.{layer}." in name and parameter.shape == (EXPERTS, HIDDEN)
    ]
    assert len(found) == 1
    return found[0]


def bias_of(model: Any, layer: int) -> torch.Tensor | None:
    """The correction bias of a layer, a tensor of as many numbers as there are experts; None where there is none."""
    found = [
        tensor
        for name, tensor in model.state_dict().items()
        if f".layers.{layer}." in name and name.endswith("_bias") and tensor.numel() == EXPERTS
    ]
    assert len(found) < 2
    return found[0] if found else None
