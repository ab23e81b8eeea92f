"""Toy checkpoints as on the Hub, in float32, and what the patcher leaves of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from namex_hf.models import PATCHED, remote_code
from namex_hf.models.routers import ChosenRouting
from namex_hf.models.soft_curvature import CalibratedCurvature
from namex_hf.models.soft_kronecker import KroneckerCurvature
from tests.helpers.checkpoints import moe_layers, write_folder
from tests.helpers.toy_models import Lot, toy_config, toy_tensors

VOCAB = 61
SIZES = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 32,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "vocab_size": VOCAB,
}
OWN = {"qwen2_moe": {"num_key_value_heads": 2, "shared_expert_intermediate_size": 24}, "deepseek": {}}


def patch_by_hand(source: Path, folder: Path) -> Path:
    """What the patcher leaves: the source's tensors, random base experts, the recipe, the remote code."""
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    bases = Lot(config["hidden_size"], seed=7)
    for layer in moe_layers(config):
        bases.mlp(f"model.layers.{layer}.mlp.base_expert", config["moe_intermediate_size"])
    patched = PATCHED[config["model_type"]]
    code = remote_code(patched.model_type)
    config |= {"model_type": patched.model_type, "auto_map": code.auto_map, "namex": {"merge": "residual"}}
    config["architectures"] = [code.auto_map["AutoModelForCausalLM"].split(".")[1]]
    write_folder(folder, config, tensors | bases)
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
            config = toy_config(family, **{**SIZES, **OWN[family], **changes})
            tensors = toy_tensors(config, torch.float32, seed=3)
            made[key] = write_folder(tmp_path_factory.mktemp("hub") / family, config, tensors)
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
