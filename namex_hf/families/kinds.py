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

PATTERNS = {
    "experts": r"\.mlp\.experts\.",
    "base": r"\.mlp\.base_expert\.",
    "router": r"\.mlp\.(gate|cosine_router)\.",
    "curvature": r"\.mlp\.curvature\.",
    "shared": r"\.mlp\.shared_expert",
    "dense": r"\.mlp\.(gate|up|down)_proj\.",
    "attention": r"\.self_attn\.",
    "embeddings": r"(^|\.)(embed_tokens|lm_head)\.",
    "norms": r"norm\.",
}


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
