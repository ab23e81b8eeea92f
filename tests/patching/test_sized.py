"""Shares of a model as widths and numbers of experts, and how much text is enough."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from namex_hf.families import MoeShape
from namex_hf.merging.gate import Gate
from namex_hf.patching.sized import fitted_equations, kept_width, sized
from namex_hf.recipe import Recipe

QWEN15 = MoeShape((0, 1), 60, Gate(4), hidden=2048, width=1408, shared_width=5632)
QWEN3 = MoeShape((0, 1), 128, Gate(8, True), hidden=2048, width=768, shared_width=0)
TINY = MoeShape((0, 1), 16, Gate(4), hidden=128, width=80, shared_width=160)


@pytest.mark.parametrize(
    ("share", "width", "kept"),
    [
        *((0.75, 80, 60), (0.5, 80, 40), (0.25, 80, 20)),
        *((0.5, 1408, 704), (0.74, 1408, 1024), (0.25, 1408, 352), (0.5, 768, 384), (0.34, 768, 256)),
        *((0.29, 100, 29), (0.07, 100, 7), (0.001, 100, 1), (1 / 3, 96, 32)),
    ],
)
def test_widths_that_programs_take(share: float, width: int, kept: int):
    assert kept_width(share, width) == kept


@given(st.floats(0.001, 0.999), st.integers(1, 1 << 14))
def test_no_width_is_above_its_share_or_far_below(share: float, width: int):
    kept = kept_width(share, width)
    assert 1 <= kept <= max(1, share * width + 1e-6)
    assert kept > 0.97 * share * width - 1


@pytest.mark.parametrize(
    ("fields", "field", "number"),
    [
        ({"keep": 0.5}, "width", 40),
        ({"keep": 0.5, "merge": "grouped"}, "experts", 8),
        ({"keep": 0.49, "merge": "grouped", "fit": "layer"}, "experts", 7),
        ({"width": 33, "merge": "narrow"}, "width", 33),
    ],
)
def test_a_share_becomes_a_number(fields: dict, field: str, number: int):
    """The number alone is stored; a recipe that has it already stays as it is."""
    recipe = sized(Recipe(**fields), TINY)
    assert (recipe.to_dict()[field], recipe.to_dict()["keep"]) == (number, None)
    assert sized(recipe, TINY) == recipe
    assert Recipe.from_dict(recipe.to_stored()) == recipe


@pytest.mark.parametrize(
    ("fields", "shape", "tokens"),
    [
        ({"keep": 0.5}, TINY, 65_536),
        ({"keep": 0.5}, QWEN15, 675_840),
        ({"keep": 0.5}, QWEN3, 393_216),
        ({"keep": 0.74, "fit": "layer"}, QWEN15, 737_280),
        ({"keep": 0.5, "calibration_tokens": 65_536}, QWEN15, 65_536),
        ({"keep": 0.5, "merge": "grouped", "fit": "router"}, QWEN15, 65_536),
    ],
)
def test_text_enough(fields: dict, shape: MoeShape, tokens: int):
    recipe = sized(Recipe(**fields), shape)
    assert recipe.calibration.tokens == tokens
    if "fit" in fields and "merge" not in fields:
        assert fitted_equations(tokens, shape, shape.experts, recipe.to_dict()["width"]) == 16
