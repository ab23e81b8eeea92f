"""Every combination of merge, method, momentum and disagreement point: refused, or patched on both paths and run."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from odd_checkpoints import aligned, differing
from transformers import AutoModelForCausalLM

from namex_hf import Recipe, load_patched, patch_checkpoint, patch_model
from namex_hf.errors import RecipeError

MERGES = ("residual", "soft", "grouped")
METHODS = ("namex-full", "namex", "ep-camex", "camex", "smear", "smoe")
MOMENTA = ("none", "complex", "quaternion")
POINTS = ("zero", "mean")
# The combinations that mean something: with a momentum where a base walks, with a point where a bargain is played.
WALKING = {(merge, method) for merge in ("residual", "soft") for method in ("namex-full", "namex", "ep-camex")}
STANDING = {("residual", "camex"), ("soft", "camex"), ("soft", "smear"), ("residual", "smoe")}
GROUPING = {("grouped", "namex-full"), ("grouped", "ep-camex")}


def means_something(merge: str, method: str, momentum: str, point: str) -> bool:
    if (merge, method) not in WALKING | STANDING | GROUPING:
        return False
    walks, bargains = (merge, method) in WALKING, method in ("namex-full", "namex")
    return (walks or momentum == "none") and (bargains or point == "zero")


def fields(merge: str, method: str, momentum: str, point: str) -> dict[str, Any]:
    own = {"experts": 3} if merge == "grouped" else {"segment": 4} if merge == "soft" else {}
    return {"merge": merge, "method": method, "momentum": momentum, "disagreement": point, **own}


ALL = list(product(MERGES, METHODS, MOMENTA, POINTS))
VALID = [row for row in ALL if means_something(*row)]


def test_the_matrix_is_that_of_the_recipe() -> None:
    specs = Recipe.__dataclass_fields__
    names = ("merge", "method", "momentum", "disagreement")
    assert [specs[name].metadata["choices"] for name in names] == [MERGES, METHODS, MOMENTA, POINTS]
    assert len(VALID) == 2 * (2 * 6 + 3) + 4 + 3


@pytest.mark.parametrize("row", [row for row in ALL if row not in VALID], ids="-".join)
def test_senseless_combinations_are_refused(row: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError, match="found"):
        Recipe(**fields(*row))


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek"])
@pytest.mark.parametrize("row", VALID, ids="-".join)
def test_every_other_combination_works(odd, tmp_path: Path, family: str, row: tuple[str, ...]) -> None:
    """Both paths give one model, bit for bit; it speaks, and differs from the original unless that is the method."""
    source, recipe = odd(family, torch.float32), Recipe(**fields(*row))
    patch_checkpoint(source, tmp_path / "out", recipe)
    original = aligned(AutoModelForCausalLM.from_pretrained(source))
    tokens = torch.arange(3, 25).reshape(2, 11)
    before = original(input_ids=tokens).logits
    stored, live = aligned(load_patched(tmp_path / "out")), aligned(patch_model(original, recipe))
    assert type(stored) is type(live)
    assert differing(stored.state_dict(), live.state_dict()) == []
    logits = stored(input_ids=tokens).logits
    assert torch.equal(logits, live(input_ids=tokens).logits)
    assert logits.isfinite().all()
    assert torch.equal(logits, before) == (recipe.method == "smoe")
