"""What published models take in few bits, whole and with half of their width: ``python benchmarks/published_bytes.py``.

By formula, as equal bytes are counted in a comparison: routed experts in so many bits, scales and zeros included, the
other matrices of decoder layers in 8, embedding, head, norms and routers in 16. Shapes are those of the models'
configurations; no weights are needed. In gigabytes of 10^9 bytes.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2MoeConfig, Qwen3MoeConfig

from namex_hf.checkpoint.header import TensorSpan
from namex_hf.checkpoint.source import Checkpoint
from namex_hf.evaluation.table import Table
from namex_hf.families.outline import build, outline_of
from namex_hf.patching.sized import kept_width
from namex_hf.quantising.matrices import Matrices, matrices_of

MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "Qwen1.5-MoE-A2.7B": (
        Qwen2MoeConfig,
        {
            "num_hidden_layers": 24,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
        },
    ),
    "Qwen3-30B-A3B": (
        Qwen3MoeConfig,
        {
            "num_hidden_layers": 48,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
        },
    ),
}
COMMON = {"hidden_size": 2048, "vocab_size": 151_936, "tie_word_embeddings": False}
BITS = (8, 4, 3)


def checkpoint_of(name: str) -> Checkpoint:
    """Every tensor's name and shape, in bfloat16, without a file."""
    kind, fields = MODELS[name]
    config = json.loads(json.dumps(kind(**COMMON, **fields).to_dict()))  # keys are text, as in a file
    outline, place = outline_of(config), Path("model.safetensors")
    tensors = build(config).state_dict().items()
    shapes = {outline.file(key): tuple(tensor.shape) for key, tensor in tensors if ".experts." not in key}
    shapes |= {key: outline.shape.of(projection) for key, (_, _, projection) in outline.places.items()}
    spans = {key: TensorSpan(place, 0, torch.bfloat16, shape) for key, shape in shapes.items()}
    return Checkpoint(place.parent, config, (place,), spans, name=name)


def gigabytes(matrices: Matrices, width: int) -> list[str]:
    stored = [matrices.storage(bits, width) for bits in BITS]
    sizes = [stored[0].unquantised.bytes, *(one.bytes for one in stored)]
    return [f"{size / 1e9:.1f}" for size in sizes]


def main() -> None:
    rows = []
    for name in MODELS:
        matrices = matrices_of(checkpoint_of(name))
        width = matrices.outline.shape.width
        for share in (1, 0.75, 0.5):
            kept = width if share == 1 else kept_width(share, width)
            rows.append([name, f"{kept}", *gigabytes(matrices, kept)])
    table = Table(["model", "width", "16 bit", *(f"{bits} bit" for bits in BITS)], rows)
    print(*table.markdown(numbers=True), sep="\n")


if __name__ == "__main__":
    main()
