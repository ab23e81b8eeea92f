"""Families of other packages: registered by a call or an entry point, and refused for text where no pass is exact."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from namex_hf import Recipe, patch_checkpoint, register_family
from namex_hf.errors import FamilyError, UsageError
from namex_hf.families import FAMILIES, Family, Gate, outline
from tests.helpers.checkpoints import read_config
from tests.helpers.family_models import save_stock
from tests.helpers.recipes import recipe_of
from tests.helpers.toy_models import add_tokenizer

FEWER = {"merge": "grouped", "experts": 4}
MODULE = """
from namex_hf import register_family
from namex_hf.families import Family, Gate
register_family(Family("exaone_moe", lambda config: Gate(config.num_experts_per_tok)))
"""


def gate(config: Any) -> Gate:
    """Sigmoid, choice with a bias, renormalised and scaled."""
    return Gate(config.num_experts_per_tok, True, "sigmoid", config.routed_scaling_factor)


def family(model_type: str, **fields: Any) -> Family:
    bias, shared = "gate.e_score_correction_bias", "shared_experts"
    return Family(model_type, gate, bias=bias, shared_name=shared, least=2, **fields)


EXAONE = family("exaone_moe")
INDEXED = family("glm_moe_dsa", experts_field="n_routed_experts")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = dict(FAMILIES)
    outline._outline.cache_clear()  # no program describes a type twice
    yield
    FAMILIES.clear()
    FAMILIES.update(before)
    outline._outline.cache_clear()


def source(folder: Path, name: str) -> Path:
    add_tokenizer(save_stock(folder, name))
    return folder


def test_it_is_patched_with_and_without_text(words: Path, tmp_path: Path) -> None:
    model = source(tmp_path / "model", "exaone_moe")
    with pytest.raises(FamilyError, match="model_type 'exaone_moe' is not a supported family"):
        patch_checkpoint(model, tmp_path / "plain", Recipe(**FEWER))
    register_family(EXAONE)
    for name, fields in {"plain": {}, "text": {"fit": "router"}}.items():
        patch_checkpoint(model, tmp_path / name, recipe_of(words, {**FEWER, **fields}))
        _, info = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert read_config(tmp_path / name)["num_experts"] == 4


def test_a_wrong_description_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = source(tmp_path / "model", "exaone_moe")
    register_family(Family("exaone_moe", gate, shared_name="shared_experts"))
    with pytest.raises(FamilyError, match="'exaone_moe': gate values of the class"):
        patch_checkpoint(model, tmp_path / "out", Recipe(**FEWER))
    assert not (tmp_path / "out").exists()


def test_layers_that_take_what_others_make_are_refused_for_text_alone(words: Path, tmp_path: Path) -> None:
    model = source(tmp_path / "model", "glm_moe_dsa")
    register_family(INDEXED)
    with pytest.raises(FamilyError) as error:
        patch_checkpoint(model, tmp_path / "text", recipe_of(words, {**FEWER, "fit": "router"}))
    assert "GlmMoeDsaModel" in str(error.value)
    assert str(error.value).endswith("calibration text cannot be used; a recipe without text works")
    assert not (tmp_path / "text").exists()
    patch_checkpoint(model, tmp_path / "plain", Recipe(**FEWER))
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain")


def test_layers_whose_output_is_no_sum_have_to_say_so(words: Path, tmp_path: Path) -> None:
    """A norm follows FlexOLMo's experts."""
    model = source(tmp_path / "model", "flex_olmo")
    known = FAMILIES.pop("flex_olmo")
    register_family(Family("flex_olmo", known.gate, width_field=known.width_field, norm=None))
    with pytest.raises(FamilyError, match=r"'flex_olmo': layer 0 by itself is .* a recipe without text works"):
        patch_checkpoint(model, tmp_path / "out", recipe_of(words, {**FEWER, "fit": "router"}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["mixtral", "exaone_moe"])
def test_a_type_is_taken_once(name: str) -> None:
    register_family(EXAONE)
    with pytest.raises(UsageError, match=f"family '{name}' is there already"):
        register_family(Family(name, gate))
    assert FAMILIES["exaone_moe"] is EXAONE


def test_entry_points_are_found_when_a_type_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = tmp_path / "other-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[namex_hf.families]\nother = other_families\n")
    (tmp_path / "other_families.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(FamilyError, match="'exaone_moe': gate values of the class"):
        patch_checkpoint(source(tmp_path / "model", "exaone_moe"), tmp_path / "out", Recipe(**FEWER))
    assert "exaone_moe" in FAMILIES
