"""Recipes of the folders that reports are drawn of."""

from namex_hf.recipe import Recipe

GROUPED = Recipe(merge="grouped", experts=5)


CALIBRATED = Recipe(merge="grouped", experts=5, fit="router", fit_steps=10, calibration_tokens=5120)


PRUNED = Recipe(merge="grouped", experts=5, operator="keep", grouping="none", calibration_tokens=5120)


FORMS = {
    "qwen2_moe residual": ("qwen2_moe", Recipe(), None),
    "qwen2_moe grouped": ("qwen2_moe", GROUPED, None),
    "qwen2_moe calibrated": ("qwen2_moe", CALIBRATED, None),
    "qwen2_moe pruned": ("qwen2_moe", PRUNED, None),
    "qwen2_moe sparse": ("qwen2_moe", Recipe(method="smoe"), None),
    "qwen2_moe stable": ("qwen2_moe", Recipe(method="smoe", routing="stable", calibration_tokens=5120), None),
    "qwen2_moe smear": ("qwen2_moe", Recipe(merge="soft", method="smear"), None),
    "deepseek residual": ("deepseek", Recipe(base="first", every=2), None),
    "deepseek camex": ("deepseek", Recipe(method="camex"), None),
    "deepseek cosine": ("deepseek", Recipe(routing="cosine"), None),
    "deepseek kronecker": ("deepseek", Recipe(merge="soft", curvature="kronecker", rank=2), None),
    "deepseek grouped": ("deepseek", GROUPED, None),
    "deepseek as qwen2_moe": ("deepseek", GROUPED, "qwen2_moe"),
}
