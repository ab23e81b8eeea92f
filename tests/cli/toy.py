"""Toy checkpoints in the form of the Hub: transformers' own classes, random weights, a byte-level tokenizer."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

from namex_hf.models import DeepseekConfig, DeepseekForCausalLM

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "num_experts_per_tok": 3,
    "vocab_size": 260,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
    "eos_token_id": 256,
    "pad_token_id": 256,
    "bos_token_id": None,
}
CLASSES: dict[str, Any] = {
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM, {"num_experts": 8, "shared_expert_intermediate_size": 16}),
    "deepseek": (
        DeepseekConfig,
        DeepseekForCausalLM,
        {"n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1},
    ),
}


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


def save_toy(folder: Path, family: str = "qwen2_moe", *, tokenizer: bool = False, fused: bool = False) -> Path:
    """A checkpoint of a few thousand weights, in bfloat16."""
    config, model, own = CLASSES[family]
    torch.manual_seed(5)
    toy = model(config(**SIZES, **own)).to(torch.bfloat16)
    toy.save_pretrained(folder, save_original_format=not fused)
    for code in folder.glob("*.py"):  # what our DeepSeek class leaves; a stock folder has none
        code.unlink()
    change_config(folder, auto_map=None)
    if tokenizer:
        toy_tokenizer().save_pretrained(folder)
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    """Set fields of ``config.json``; None takes a field away."""
    config = json.loads((folder / "config.json").read_text())
    config |= changes
    (folder / "config.json").write_text(json.dumps({n: v for n, v in config.items() if v is not None}))
