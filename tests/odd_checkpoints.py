"""Odd little checkpoints of both families, written by hand: what the Hub could hold, at toy size.

Nothing here shares code with the package, so that what it takes for granted (names, which layers are mixtures) is
stated twice.
"""

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
FAMILIES = ("qwen2_moe", "deepseek")
INDEX = "model.safetensors.index.json"
VOCAB = 53

COMMON = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 16,
    "initializer_range": 0.02,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "moe_intermediate_size": 8,
    "norm_topk_prob": False,
    "num_attention_heads": 2,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 5000.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": VOCAB,
}
OWN: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
        "num_experts": 7,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 24,
        "sliding_window": 32,
        "use_sliding_window": False,
    },
    "deepseek": {
        "architectures": ["DeepseekForCausalLM"],
        "attention_bias": False,
        "auto_map": {
            "AutoConfig": "somebody/else--configuration_deepseek.DeepseekConfig",
            "AutoModelForCausalLM": "somebody/else--modeling_deepseek.DeepseekForCausalLM",
        },
        "aux_loss_alpha": 0.001,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_routed_experts": 7,
        "n_shared_experts": 3,
        "rope_scaling": None,
        "scoring_func": "softmax",
        "seq_aux": True,
    },
}


def experts_field(config: dict[str, Any]) -> str:
    return "num_experts" if config["model_type"] == "qwen2_moe" else "n_routed_experts"


def experts_of(config: dict[str, Any]) -> int:
    return config[experts_field(config)]


def shared_name(config: dict[str, Any]) -> str:
    return "shared_expert" if config["model_type"] == "qwen2_moe" else "shared_experts"


def moe_layers(config: dict[str, Any]) -> list[int]:
    """By the words of the families' own documentation; loading with transformers says whether that is right."""
    layers = range(config["num_hidden_layers"])
    if config["model_type"] == "qwen2_moe":
        step, dense = config["decoder_sparse_step"], config["mlp_only_layers"]
        return [i for i in layers if i not in dense and (i + 1) % step == 0]
    return [i for i in layers if i >= config["first_k_dense_replace"] and i % config["moe_layer_freq"] == 0]


def odd_config(family: str, dtype: torch.dtype, **changes: Any) -> dict[str, Any]:
    named = str(dtype).removeprefix("torch.")
    return {"model_type": family, **COMMON, **OWN[family], "torch_dtype": named, **changes}


class Lot(Tensors):
    """Tensors by name, drawn one after the other."""

    def __init__(self, hidden: int, seed: int) -> None:
        super().__init__()
        self.hidden, self.draw = hidden, torch.Generator().manual_seed(seed)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.draw)

    def linear(self, name: str, rows: int, columns: int) -> None:
        self[f"{name}.weight"] = self.random(rows, columns) / columns**0.5

    def mlp(self, name: str, inner: int) -> None:
        self.linear(f"{name}.gate_proj", inner, self.hidden)
        self.linear(f"{name}.up_proj", inner, self.hidden)
        self.linear(f"{name}.down_proj", self.hidden, inner)

    def norm(self, name: str) -> None:
        self[f"{name}.weight"] = 1 + 0.1 * self.random(self.hidden)

    def attention(self, name: str, biased: tuple[str, ...]) -> None:
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.linear(f"{name}.{projection}", self.hidden, self.hidden)
            if projection in biased:
                self[f"{name}.{projection}.bias"] = 0.1 * self.random(self.hidden)

    def mixture(self, name: str, config: dict[str, Any]) -> None:
        width, experts = config["moe_intermediate_size"], experts_of(config)
        shared = config.get("shared_expert_intermediate_size") or width * config["n_shared_experts"]
        self.linear(f"{name}.gate", experts, self.hidden)
        self.mlp(f"{name}.{shared_name(config)}", shared)
        if config["model_type"] == "qwen2_moe":
            self.linear(f"{name}.shared_expert_gate", 1, self.hidden)
        for expert in range(experts):
            self.mlp(f"{name}.experts.{expert}", width)
            for projection in PROJECTIONS:
                tensor = f"{name}.experts.{expert}.{projection}.weight"
                size = 0.3 + torch.rand((), generator=self.draw)
                self[tensor] = size * self[tensor] + 0.5 * self[f"{name}.experts.0.{projection}.weight"]


def odd_tensors(config: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> Tensors:
    """Random tensors under the Hub's per-expert names; experts of a layer differ in size and share a common part."""
    made = Lot(config["hidden_size"], seed)
    biased = ("q_proj", "k_proj", "v_proj") if config["model_type"] == "qwen2_moe" else ()
    if config.get("attention_bias"):
        biased = ("q_proj", "k_proj", "v_proj", "o_proj")
    made["model.embed_tokens.weight"] = made.random(config["vocab_size"], config["hidden_size"])
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        made.attention(f"{name}.self_attn", biased)
        made.norm(f"{name}.input_layernorm")
        made.norm(f"{name}.post_attention_layernorm")
        if layer in moe_layers(config):
            made.mixture(f"{name}.mlp", config)
        else:
            made.mlp(f"{name}.mlp", config["intermediate_size"])
    made.norm("model.norm")
    if not config["tie_word_embeddings"]:
        made.linear("lm_head", config["vocab_size"], config["hidden_size"])
    return {name: tensor.to(dtype).contiguous() for name, tensor in made.items()}


def fused(config: dict[str, Any], tensors: Tensors) -> Tensors:
    """The same in the layout of transformers 5: ``gate_up_proj [N, 2I, H]`` and ``down_proj [N, H, I]``."""
    result = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    for layer in moe_layers(config):
        block = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors[f"{block}.{expert}.{projection}.weight"] for expert in range(experts_of(config))])
            for projection in PROJECTIONS
        )
        result[f"{block}.gate_up_proj"] = torch.cat([gate, up], dim=1)
        result[f"{block}.down_proj"] = down
    return result


def write_folder(folder: Path, config: dict[str, Any], tensors: Tensors, shards: int = 1, seed: int = 0) -> Path:
    """Write a checkpoint; with several shards every tensor goes to one by lot, so that layers lie scattered."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    lot = random.Random(seed)
    files = [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    weight_map = {name: files[k] if k < shards else lot.choice(files) for k, name in enumerate(tensors)}
    for file in files:
        held = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(held, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def add_tokenizer(folder: Path) -> None:
    """A tokenizer of one word a token, with a pointer to code of others, and such code beside it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    foreign = {"auto_map": {"AutoTokenizer": ["somebody/else--tokenization.Tok", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | foreign))
    (folder / "tokenization.py").write_text("raise RuntimeError('foreign code was run')\n")
    (folder / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}\n')


def write_words(path: Path, seed: int) -> Path:
    """Paragraphs of the words that the odd checkpoints' tokenizer knows, some far more frequent than others."""
    lot = random.Random(seed)
    words = [f"w{number}" for number in range(3, VOCAB)]
    paragraphs = [" ".join(lot.choices(words, [1 / n for n in range(1, len(words) + 1)], k=40)) for _ in range(90)]
    path.write_text("\n\n".join(paragraphs))
    return path


def odd_checkpoint(
    folder: Path,
    family: str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    shards: int = 3,
    fuse: bool = False,
    tokenizer: bool = False,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Write a whole one; ``changes`` are fields of its configuration."""
    config = odd_config(family, dtype, **changes)
    tensors = odd_tensors(config, dtype, seed)
    write_folder(folder, config, fused(config, tensors) if fuse else tensors, shards, seed)
    if tokenizer:
        add_tokenizer(folder)
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def read_tensors(folder: Path) -> Tensors:
    """All tensors of a folder, by the safetensors library; an index must be right and complete."""
    files = sorted(folder.glob("model*.safetensors"))
    if len(files) == 1 and files[0].name == "model.safetensors":
        return load_file(files[0])
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    found: Tensors = {}
    for file in files:
        held = load_file(file)
        assert not held.keys() & found.keys()
        assert all(weight_map[name] == file.name for name in held)
        found |= held
    assert weight_map.keys() == found.keys()
    return found


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


def differing(one: Tensors, other: Tensors) -> list[str]:
    """Names that are in one alone, or whose bytes differ."""
    return sorted(
        name for name in {*one, *other} if name not in one or name not in other or not same_bits(one[name], other[name])
    )


def aligned(model: Any) -> Any:
    """The model with its parameters and buffers in fresh memory.

    Tensors mapped from a file lie wherever their header's length puts them, and matrix kernels round differently
    by alignment: equal numbers would give logits that differ in the last bit.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def settled_files(folder: Path) -> dict[str, bytes]:
    """What has to be byte-identical however often a run was killed: weights, index, config, recipe, statistics."""
    patterns: Iterable[str] = ("model*", "config.json", "namex/recipe.yaml", "namex/statistics.safetensors")
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for pattern in patterns for path in folder.glob(pattern)
    }


def all_files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def rewrite_tensors(folder: Path, change: Callable[[Tensors], None]) -> None:
    """Change the tensors of a one-file checkpoint in place."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def forget_files(folder: Path) -> None:
    """Take the list of files out of a folder's report, so that what is missing or changed is met where it is read."""
    path = folder / "namex" / "report.json"
    report = json.loads(path.read_text())
    del report["files"]
    path.write_text(json.dumps(report))
