from pathlib import Path

import pytest

from namex_hf import patch_checkpoint
from tests.helpers.forms import FORMS
from tests.helpers.toy_models import save_toy


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
