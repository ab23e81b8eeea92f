"""The kind of a model's parameter, from its name."""

import re

KINDS = {
    "experts": "routed experts",
    "base": "base experts, one a layer",
    "router": "linear or cosine routers",
    "curvature": "trainable Kronecker curvature of merge: soft",
    "shared": "shared experts, with their gates",
    "dense": "MLPs of the layers that are no mixtures",
    "attention": "projections of self-attention",
    "embeddings": "token embeddings and the language model's head",
    "norms": "all norms",
}
"""Kinds of parameters with their descriptions, in the order of tables."""

BLOCK, DENSE = r"(mlp|feed_forward)\.", r"(mlp|feed_forward)\.((gate|up|down)_proj|w[123])"
ATTENTION = r"(self_attn|linear_attn|mamba|conv)\."
PATTERNS = {
    "experts": rf"\.{BLOCK}experts\.",
    "base": rf"\.{BLOCK}base_expert\.",
    "router": rf"\.{BLOCK}(gate|router|cosine_router)\.",
    "curvature": rf"\.{BLOCK}curvature\.",
    "shared": rf"\.{BLOCK}shared_(expert|mlp)",
    "dense": rf"\.{DENSE}\.",
    "attention": rf"\.{ATTENTION}",
    "embeddings": r"(^|\.)(embed_tokens|lm_head)\.",
    "norms": r"norm\.",
}
FUSED = {
    "experts": ("experts.gate_up_proj", "experts.down_proj"),
    "router": ("gate.weight", "router.weight", "cosine_router.projection", "cosine_router.embeddings"),
}
"""Ends of the names of parameters that are in no `nn.Linear`, by kind."""
LINEAR = {
    "attention": rf"{ATTENTION}\w*proj\w*",
    "shared": rf"{BLOCK}shared_(experts?|mlp)\.(gate|up|down)_proj",
    "dense": DENSE,
}
"""Regular expressions for the ends of names of `nn.Linear` modules, by kind."""


def kind_of(name: str) -> str:
    """The kind of a parameter of a supported family, stock or patched, with or without an adapter around it.

    Args:
        name: the parameter's name in `named_parameters`.

    Raises:
        ValueError: no pattern matches the name.
    """
    for kind, pattern in PATTERNS.items():
        if re.search(pattern, name):
            return kind
    raise ValueError(f"parameter {name} is of no known kind; accepted: {', '.join(KINDS)}")
