"""Toy checkpoints, written by hand as the Hub stores them: per-expert tensors and an old-style ``config.json``."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from namex_hf.models import PATCHED, remote_code
from namex_hf.models.routers import ChosenRouting
from namex_hf.models.soft_curvature import CalibratedCurvature
from namex_hf.models.soft_kronecker import KroneckerCurvature

VOCAB = 61

DEEPSEEK = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "deepseek-ai/deepseek-moe-16b-base--configuration_deepseek.DeepseekConfig",
        "AutoModel": "deepseek-ai/deepseek-moe-16b-base--modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "deepseek-ai/deepseek-moe-16b-base--modeling_deepseek.DeepseekForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "model_type": "deepseek",
    "moe_intermediate_size": 16,
    "moe_layer_freq": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0",
    "use_cache": True,
    "vocab_size": VOCAB,
}

QWEN = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "decoder_sparse_step": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 16,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 5000.0,
    "router_aux_loss_coef": 0.01,
    "shared_expert_intermediate_size": 24,
    "sliding_window": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": VOCAB,
}


def _linear(name: str, out_features: int, in_features: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.randn(out_features, in_features) / in_features**0.5}


def _mlp(name: str, hidden: int, width: int) -> dict[str, torch.Tensor]:
    return {
        **_linear(f"{name}.gate_proj", width, hidden),
        **_linear(f"{name}.up_proj", width, hidden),
        **_linear(f"{name}.down_proj", hidden, width),
    }


def _attention(name: str, config: dict) -> dict[str, torch.Tensor]:
    hidden, head = config["hidden_size"], config["hidden_size"] // config["num_attention_heads"]
    widths = {"q_proj": hidden, "k_proj": head * config["num_key_value_heads"], "o_proj": hidden}
    widths["v_proj"] = widths["k_proj"]
    tensors: dict[str, torch.Tensor] = {}
    for projection, width in widths.items():
        tensors |= _linear(f"{name}.{projection}", width, hidden)
        # Qwen has biases on q, k and v; DeepSeek, where it has any, on the output projection too.
        qwen = config["model_type"] == "qwen2_moe"
        if config.get("attention_bias") or (qwen and projection != "o_proj"):
            tensors[f"{name}.{projection}.bias"] = 0.3 * torch.randn(width)
    return tensors


def is_dense(config: dict, layer: int) -> bool:
    return layer < config.get("first_k_dense_replace", 0) or layer % config.get("moe_layer_freq", 1) != 0


def hub_tensors(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors under the Hub's names, float32, of unit scale so that every part shows in the logits."""
    torch.manual_seed(seed)
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    tensors = {"model.embed_tokens.weight": torch.randn(config["vocab_size"], hidden)}
    tensors |= _linear("lm_head", config["vocab_size"], hidden)
    tensors["model.norm.weight"] = 1 + 0.1 * torch.randn(hidden)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        tensors |= _attention(f"{name}.self_attn", config)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.{norm}.weight"] = 1 + 0.1 * torch.randn(hidden)
        if is_dense(config, layer):
            tensors |= _mlp(f"{name}.mlp", hidden, config["intermediate_size"])
            continue
        experts = config.get("n_routed_experts") or config["num_experts"]
        tensors |= _linear(f"{name}.mlp.gate", experts, hidden)
        for expert in range(experts):
            tensors |= _mlp(f"{name}.mlp.experts.{expert}", hidden, width)
        if config["model_type"] == "qwen2_moe":
            tensors |= _mlp(f"{name}.mlp.shared_expert", hidden, config["shared_expert_intermediate_size"])
            tensors |= _linear(f"{name}.mlp.shared_expert_gate", 1, hidden)
        elif config["n_shared_experts"]:
            tensors |= _mlp(f"{name}.mlp.shared_experts", hidden, width * config["n_shared_experts"])
    return tensors


def write_folder(folder: Path, config: dict, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def patch_by_hand(source: Path, folder: Path) -> Path:
    """What the patcher leaves: the source's tensors, random base experts, the recipe, the remote code."""
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    torch.manual_seed(7)
    for layer in range(config["num_hidden_layers"]):
        if not is_dense(config, layer):
            name = f"model.layers.{layer}.mlp.base_expert"
            tensors |= _mlp(name, config["hidden_size"], config["moe_intermediate_size"])
    patched = PATCHED[config["model_type"]]
    code = remote_code(patched.model_type)
    config |= {"model_type": patched.model_type, "auto_map": code.auto_map, "namex": {"merge": "residual"}}
    config["architectures"] = [code.auto_map["AutoModelForCausalLM"].split(".")[1]]
    write_folder(folder, config, tensors)
    for file in code.files:
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``hub_folder("deepseek", **changes)``: a stock checkpoint as on the Hub; made once for the same arguments."""
    made: dict[str, Path] = {}

    def make(family: str, **changes) -> Path:
        key = json.dumps([family, changes], sort_keys=True)
        if key not in made:
            config = {"deepseek": DEEPSEEK, "qwen2_moe": QWEN}[family] | changes
            made[key] = write_folder(tmp_path_factory.mktemp("hub") / family, config, hub_tensors(config))
        return made[key]

    return make


@pytest.fixture(scope="session")
def patched_folder(hub_folder, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``patched_folder("qwen2_moe")``: the stock checkpoint of that family, patched by hand."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = patch_by_hand(hub_folder(family), tmp_path_factory.mktemp("patched") / f"patched_{family}")
        return made[family]

    return make


def measure_by_hand(model) -> None:
    """Curvatures such as text might leave: experts of unlike use, with directions of unlike strength."""
    draw = torch.Generator().manual_seed(11)
    for module in model.modules():
        if isinstance(module, CalibratedCurvature):
            held = module.state_dict()  # shares memory with the module
            for name in sorted(held):
                normal = name.endswith("directions")
                values = (torch.randn if normal else torch.rand)(held[name].shape, generator=draw, dtype=torch.float64)
                held[name].copy_(values if normal else values + 0.2)
            held["usage"] /= held["usage"].sum()
            for name in ("input_floor", "neuron_floor"):
                held[name] /= held["usage"] @ held[name]


@torch.no_grad()
def bend_by_hand(model) -> None:
    """Trainable curvatures such as training might leave: no product is the identity, none is like another."""
    draw = torch.Generator().manual_seed(12)
    for module in model.modules():
        if isinstance(module, KroneckerCurvature):
            for _, factor in sorted(module.named_parameters()):
                rank, side = factor.shape[1:3]
                noise = torch.randn(factor.shape, generator=draw, dtype=torch.float64)
                factor.copy_(torch.eye(side, dtype=torch.float64) / rank**0.25 + 0.2 * noise)


@torch.no_grad()
def route_by_hand(model) -> None:
    """Cosine routers near the pretrained ones' own form, and tables in which every third id was never seen."""
    draw = np.random.default_rng(13)
    for block in model.modules():
        if not isinstance(block, ChosenRouting):
            continue
        weight = block.gate.weight.double().numpy()
        if block.routing == "cosine":
            left, values, right = np.linalg.svd(weight, full_matrices=False)
            router = block.cosine_router
            router.projection.copy_(torch.from_numpy(right + 0.05 * draw.standard_normal(right.shape)))
            router.embeddings.copy_(torch.from_numpy(left * values + 0.05 * draw.standard_normal(left.shape)))
            router.scale.fill_(4.0 + draw.random())
        elif block.routing == "stable":
            vocabulary, top_k = block.stable_router.assignment.shape
            table = np.stack([draw.permutation(len(weight))[:top_k] for _ in range(vocabulary)])
            table[::3] = -1
            block.stable_router.assignment.copy_(torch.from_numpy(table))


@pytest.fixture(scope="session")
def namex_model(patched_folder):
    """``namex_model("qwen2_moe", routing="stable", ...)``: the patched folder under that recipe, float32.

    What it has beyond the folder is filled by hand. ``norm_topk_prob`` is the configuration's.
    """

    def make(family: str, dtype=torch.float32, norm_topk_prob=False, **fields):
        folder = patched_folder(family)
        config = AutoConfig.from_pretrained(folder)
        config.namex, config.norm_topk_prob = fields, norm_topk_prob
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype).eval()
        for fill in (measure_by_hand, bend_by_hand, route_by_hand):
            fill(model)
        for parameter in model.parameters():  # kernels round by alignment, which the file's header decides
            parameter.data = parameter.data.clone()
        return model

    return make


@pytest.fixture
def soft_model(namex_model):
    """``soft_model("qwen2_moe", eta=0.5)``: the patched folder under ``merge: soft``, float32."""

    def make(family: str, dtype=torch.float32, **fields):
        return namex_model(family, dtype, **({"merge": "soft", "segment": 4} | fields))

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    """``[2, 11]`` token ids."""
    return torch.randint(3, VOCAB, (2, 11), generator=torch.Generator().manual_seed(1))
