"""Configuration of DeepSeek-MoE v1 (``model_type: deepseek``), read as the Hub's ``config.json`` states it."""

from typing import ClassVar

import transformers
from huggingface_hub.dataclasses import strict

try:
    from transformers.configuration_utils import PreTrainedConfig
except ImportError as error:  # transformers 4; every model of this package imports this file
    raise ImportError(f"found transformers {transformers.__version__}; this code accepts 5.16 and newer") from error


def remote_classes(configuration: str, modeling: str, prefix: str) -> dict[str, str]:
    """``auto_map``, by which a folder loads as remote code. Args: two files, and how the names of classes begin."""
    kinds = {"AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    kinds |= {"AutoModelForSequenceClassification": "ForSequenceClassification"}
    classes = {auto: f"{modeling}.{prefix}{kind}" for auto, kind in kinds.items()}
    return {"AutoConfig": f"{configuration}.{prefix}Config", **classes}


@strict
class DeepseekConfig(PreTrainedConfig):
    """Fields of ``deepseek-ai/deepseek-moe-16b-base``, and its values as defaults; of a field that says which layers
    are mixtures, the default of its authors' class: all of them.

    The class reuses transformers' Qwen2-MoE layers; only the block around the experts differs. Fields that those layers
    read are derived below and never written to disk.

    Reference: Dai et al. 2024, "DeepSeekMoE: Towards Ultimate Expert Specialization".
    """

    model_type = "deepseek"
    # A cache is not a prediction. Its second name is that of transformers 5.24.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_experts": "n_routed_experts",
        "router_aux_loss_coef": "aux_loss_alpha",
        "qkv_bias": "attention_bias",
    }
    remote_classes = remote_classes("configuration_deepseek", "modeling_deepseek", "Deepseek")
    sliding_window = 0  # read by the mask builder of the Qwen2-MoE model; no layer has a sliding window
    decoder_sparse_step = 1

    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 10944
    moe_intermediate_size: int = 1408
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None  # as many as attention heads
    n_shared_experts: int | None = 2
    n_routed_experts: int = 64
    num_experts_per_tok: int = 6
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
    output_router_logits: bool = False
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    pad_token_id: int | None = None
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001

    def __post_init__(self, **kwargs):
        if self.scoring_func != "softmax":
            raise ValueError(f"scoring_func is {self.scoring_func!r}; DeepSeek-MoE v1 routes by 'softmax' only")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Save, with an own ``auto_map``: the Hub's remote code fails under transformers 5."""
        self.auto_map = dict(self.remote_classes)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @property
    def renormalises(self) -> bool:
        """Whether top-k values are scaled to sum to 1. A single value is not: it would always be 1."""
        return self.norm_topk_prob and self.num_experts_per_tok > 1

    @property
    def mlp_only_layers(self) -> list[int]:
        """Indices of the layers whose MLP is dense."""
        return [
            layer
            for layer in range(self.num_hidden_layers)
            if layer < self.first_k_dense_replace or layer % self.moe_layer_freq != 0
        ]

    @property
    def shared_expert_intermediate_size(self) -> int:
        """Width of the MLP that holds all shared experts; 0 without shared experts."""
        return self.moe_intermediate_size * (self.n_shared_experts or 0)

    @property
    def layer_types(self) -> list[str]:
        """Attention kind of every layer."""
        return ["full_attention"] * self.num_hidden_layers
