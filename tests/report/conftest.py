from pathlib import Path

import pytest

from namex_hf import patch_checkpoint
from namex_hf.recipe import Recipe
from tests.cli.toy import save_toy

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


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of everything here, by whose path a leak is known."""
    return tmp_path_factory.mktemp("here-and-nowhere-else")


@pytest.fixture(scope="session")
def patched(root: Path) -> dict[str, Path]:
    """Both families in every form."""
    models = {family: save_toy(root / family, family, tokenizer=True) for family in ("qwen2_moe", "deepseek")}
    folders = {}
    for form, (family, recipe, export_as) in FORMS.items():
        folders[form] = root / form.replace(" ", "-")
        patch_checkpoint(models[family], folders[form], recipe, export_as=export_as)
    return folders
