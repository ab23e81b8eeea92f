"""Small random models of both families: one configuration, one way to draw weights; by hand as the Hub stores them, by
transformers, or in memory.

A family is a row of `OWN`. What writes by hand shares no code with the package: what that takes for granted (names,
which layers are mixtures) is stated twice.
"""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import namex_hf.models  # noqa: F401  transformers learns of DeepSeek
from tests.helpers.checkpoints import (
    PROJECTIONS,
    Tensors,
    change_config,
    experts_of,
    moe_layers,
    shared_name,
    write_folder,
)

COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": 256,
    "hidden_act": "silu",
    "hidden_size": 16,
    "initializer_range": 0.02,
    "intermediate_size": 24,
    "max_position_embeddings": 512,
    "moe_intermediate_size": 8,
    "norm_topk_prob": False,
    "num_attention_heads": 2,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pad_token_id": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 5000.0,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 260,
}
"""Fields of every family; the vocabulary is that of `toy_tokenizer`."""
OWN: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_experts": 8,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 16,
        "sliding_window": 32,
        "use_sliding_window": False,
    },
    "deepseek": {
        "architectures": ["DeepseekForCausalLM"],
        "attention_bias": False,
        "auto_map": {
            "AutoConfig": "somebody/else--configuration_deepseek.DeepseekConfig",
            "AutoModel": "somebody/else--modeling_deepseek.DeepseekModel",
            "AutoModelForCausalLM": "somebody/else--modeling_deepseek.DeepseekForCausalLM",
        },
        "aux_loss_alpha": 0.001,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "rope_scaling": None,
        "scoring_func": "softmax",
        "seq_aux": True,
    },
}
FAMILIES = tuple(OWN)
VOCAB = 53
ODD_BY_FAMILY: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"mlp_only_layers": [1], "num_experts": 7, "shared_expert_intermediate_size": 24},
    "deepseek": {"n_routed_experts": 7, "n_shared_experts": 3},
}
ODD: dict[str, dict[str, Any]] = {
    family: {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 64,
        "num_hidden_layers": 4,
        "pad_token_id": None,
        "tie_word_embeddings": False,
        "vocab_size": VOCAB,
        **own,
    }
    for family, own in ODD_BY_FAMILY.items()
}
"""What an odd checkpoint has otherwise; `add_tokenizer` has its vocabulary."""


def toy_config(family: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> dict[str, Any]:
    """``config.json`` as old versions of transformers wrote it; ``changes`` are fields."""
    named = str(dtype).removeprefix("torch.")
    return {"model_type": family, **COMMON, **OWN[family], "torch_dtype": named, **changes}


def odd_config(family: str, dtype: torch.dtype, **changes: Any) -> dict[str, Any]:
    return toy_config(family, dtype, **{**ODD[family], **changes})


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

    def attention(self, name: str, config: dict[str, Any]) -> None:
        biased: tuple[str, ...] = ("q_proj", "k_proj", "v_proj") if config["model_type"] == "qwen2_moe" else ()
        if config.get("attention_bias"):
            biased = ("q_proj", "k_proj", "v_proj", "o_proj")
        narrow = self.hidden // int(config["num_attention_heads"]) * int(config["num_key_value_heads"])
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            rows = narrow if projection in ("k_proj", "v_proj") else self.hidden
            self.linear(f"{name}.{projection}", rows, self.hidden)
            if projection in biased:
                self[f"{name}.{projection}.bias"] = 0.1 * self.random(rows)

    def mixture(self, name: str, config: dict[str, Any]) -> None:
        width, experts = config["moe_intermediate_size"], experts_of(config)
        shared = config.get("shared_expert_intermediate_size") or width * (config.get("n_shared_experts") or 0)
        self.linear(f"{name}.gate", experts, self.hidden)
        if shared:
            self.mlp(f"{name}.{shared_name(config)}", shared)
        if config["model_type"] == "qwen2_moe":
            self.linear(f"{name}.shared_expert_gate", 1, self.hidden)
        for expert in range(experts):
            self.mlp(f"{name}.experts.{expert}", width)
            for projection in PROJECTIONS:
                tensor = f"{name}.experts.{expert}.{projection}.weight"
                size = 0.3 + torch.rand((), generator=self.draw)
                self[tensor] = size * self[tensor] + 0.5 * self[f"{name}.experts.0.{projection}.weight"]


def toy_tensors(config: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> Tensors:
    """Random tensors under the Hub's per-expert names; experts of a layer differ in size and share a common part."""
    made = Lot(config["hidden_size"], seed)
    made["model.embed_tokens.weight"] = made.random(config["vocab_size"], config["hidden_size"])
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        made.attention(f"{name}.self_attn", config)
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


def add_tokenizer(folder: Path) -> None:
    """A tokenizer of one word a token, with a pointer to code of others, and such code beside it."""
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
    tensors = toy_tensors(config, dtype, seed)
    write_folder(folder, config, fused(config, tensors) if fuse else tensors, shards, seed)
    if tokenizer:
        add_tokenizer(folder)
    return folder


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and an end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=512
    )


def toy_model(family: str = "qwen2_moe", dtype: torch.dtype = torch.float32, *, seed: int = 0, **changes: Any) -> Any:
    """In memory, without dropout, the same at every call; ``changes`` are fields of its configuration."""
    config = toy_config(family, dtype, **changes)
    own = {name: value for name, value in config.items() if name not in ("model_type", "architectures", "auto_map")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **own), dtype=dtype)
    tensors = fused(config, toy_tensors(config, dtype, seed))
    model.load_state_dict({"lm_head.weight": tensors["model.embed_tokens.weight"], **tensors})
    return model.eval()


def save_toy(
    folder: Path, family: str = "qwen2_moe", *, tokenizer: bool = False, fuse: bool = False, **changes: Any
) -> Path:
    """As transformers writes it, in bfloat16; ``changes`` are fields of its configuration."""
    toy_model(family, torch.bfloat16, **changes).save_pretrained(folder, save_original_format=not fuse)
    for code in folder.glob("*.py"):  # what our DeepSeek class leaves; a stock folder has none
        code.unlink()
    change_config(folder, auto_map=None)
    if tokenizer:
        toy_tokenizer().save_pretrained(folder)
    return folder
