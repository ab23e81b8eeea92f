"""What a checkpoint is, from its configuration and headers alone."""

from typing import Any

from ..checkpoint.layout import left_out, left_out_line, per_expert
from ..checkpoint.source import Checkpoint
from ..families import original_family


def inspection(checkpoint: Checkpoint) -> dict[str, Any]:
    """Facts in the order to show them.

    Raises:
        FamilyError, CheckpointError: the checkpoint is none that could be patched or was.
    """
    config = checkpoint.config
    family = original_family(config)
    shape = family.shape(config)
    spans = per_expert(checkpoint, family, shape)
    kinds = {
        "routed experts": 0,
        "base experts": 0,
        "added routers": 0,
        "curvature": 0,
        "shared experts": 0,
        "the rest": 0,
    }
    for name, span in spans.items():
        if ".mlp.experts." in name:
            kinds["routed experts"] += span.size
        elif ".mlp.base_expert." in name:
            kinds["base experts"] += span.size
        elif ".mlp.cosine_router." in name or ".mlp.stable_router." in name:
            kinds["added routers"] += span.size
        elif ".mlp.curvature." in name:
            kinds["curvature"] += span.size
        elif f".mlp.{family.shared_name}." in name:
            kinds["shared experts"] += span.size
        else:
            kinds["the rest"] += span.size
    recipe = config.get("namex")
    recipe = recipe if isinstance(recipe, dict) else {}
    counts = shape.experts if shape.counts is None else ", ".join(map(str, shape.counts))
    foreign = left_out_line(left_out(checkpoint, spans))
    fused = any(family.fused(layer, "gate_up_proj") in checkpoint.spans for layer in shape.layers)
    return {
        "model": checkpoint.name,
        "commit": checkpoint.commit or "none (local)",
        "family": family.model_type,
        "patched": ", ".join(str(recipe.get(name)) for name in ("merge", "method", "routing")) if recipe else "no",
        **({"recipe": ", ".join(f"{name}={value}" for name, value in recipe.items())} if recipe else {}),
        "layers": f"{config['num_hidden_layers']}, of which {len(shape.layers)} are MoE",
        "experts a layer": f"{counts} of width {shape.width}, top-{shape.top_k}",
        "top-k values": "renormalised" if shape.renormalises else "not renormalised",
        "shared expert": f"width {shape.shared_width}",
        "layout": "fused" if fused else "per expert",
        "files": len(checkpoint.shards),
        "dtype": ", ".join(sorted({str(span.dtype).removeprefix("torch.") for span in spans.values()})),
        "bytes": checkpoint.size,
        **({"other tensors": foreign} if foreign else {}),
        **{f"bytes of {kind}": size for kind, size in kinds.items()},
    }
