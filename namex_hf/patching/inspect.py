"""What a checkpoint is, from its configuration and headers alone."""

from typing import Any

from ..checkpoint.layout import left_out, left_out_line, outline_in, per_expert
from ..checkpoint.source import Checkpoint
from ..families.outline import FUSED

ADDED = {
    ".base_expert.": "base experts",
    ".cosine_router.": "added routers",
    ".stable_router.": "added routers",
    ".curvature.": "curvature",
}
"""What only a patched block has, by a part of the names of its tensors."""
KINDS = ("routed experts", "base experts", "added routers", "curvature", "shared experts", "the rest")


def inspection(checkpoint: Checkpoint) -> dict[str, Any]:
    """Facts in the order to show them.

    Raises:
        FamilyError, CheckpointError: the checkpoint is none that could be patched or was.
    """
    config = checkpoint.config
    outline = outline_in(checkpoint)
    shape, spans = outline.shape, per_expert(checkpoint, outline)
    kinds = dict.fromkeys(KINDS, 0)
    shared = {name for layer in shape.layers for part, name in outline.shared(layer).items() if part != "gate"}
    known = dict.fromkeys(outline.places, "routed experts") | dict.fromkeys(map(outline.file, shared), "shared experts")
    for name, span in spans.items():
        added = next((kind for part, kind in ADDED.items() if part in name), "the rest")
        kinds[known.get(name, added)] += span.size
    recipe = config.get("namex")
    recipe = recipe if isinstance(recipe, dict) else {}
    named = ("merge", "routing") if recipe.get("merge") == "narrow" else ("merge", "method", "routing")
    counts = shape.experts if shape.counts is None else ", ".join(map(str, shape.counts))
    foreign = left_out_line(left_out(checkpoint, spans))
    fused = any(outline.in_class(name) == outline.fused(shape.layers[0], FUSED[0]) for name in checkpoint.spans)
    return {
        "model": checkpoint.name,
        "commit": checkpoint.commit or "none (local)",
        "family": outline.family.model_type,
        "patched": ", ".join(str(recipe.get(name)) for name in named) if recipe else "no",
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
