"""Every combination of merge, method, momentum, disagreement point and routing: refused, or patched on both paths and
run."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from namex_hf import Recipe, load_patched, patch_checkpoint, patch_model
from namex_hf.checkpoint.resolve import resolve
from namex_hf.errors import RecipeError
from namex_hf.patching.plan import make_plan
from namex_hf.recipe import FIELDS
from tests.helpers.checkpoints import (
    PROJECTIONS,
    aligned,
    differing,
    experts_field,
    moe_layers,
    read_config,
    read_tensors,
)
from tests.helpers.toy_models import FAMILIES, VOCAB

MERGES = ("residual", "soft", "grouped", "narrow")
METHODS = ("namex-full", "namex", "ep-camex", "camex", "smear", "smoe")
MOMENTA = ("none", "complex", "quaternion")
POINTS = ("zero", "mean")
ROUTINGS = ("linear", "cosine", "stable")
# The combinations that mean something: with a momentum where a base walks, with a point where a bargain is played, with
# any routing.
WALKING = {(merge, method) for merge in ("residual", "soft") for method in ("namex-full", "namex", "ep-camex")}
STANDING = {("residual", "camex"), ("soft", "camex"), ("soft", "smear"), ("residual", "smoe")}
SMALLER = {("grouped", "namex-full"), ("grouped", "ep-camex"), ("narrow", "smoe")}

Row = tuple[str, str, str, str, str]


def means_something(merge: str, method: str, momentum: str, point: str, routing: str) -> bool:
    if (merge, method) not in WALKING | STANDING | SMALLER:
        return False
    walks, bargains = (merge, method) in WALKING, method in ("namex-full", "namex")
    return (walks or momentum == "none") and (bargains or point == "zero")


def fields(merge: str, method: str, momentum: str, point: str, routing: str) -> dict[str, Any]:
    own = {"grouped": {"experts": 4}, "soft": {"segment": 4}, "narrow": {"width": 4}}.get(merge, {})
    chosen = {"merge": merge, "method": method, "momentum": momentum, "disagreement": point, "routing": routing}
    return {**chosen, **own}


ALL: list[Row] = list(product(MERGES, METHODS, MOMENTA, POINTS, ROUTINGS))
VALID = [row for row in ALL if means_something(*row)]
WITH_MOMENTUM = [row for row in VALID if row[2] != "none" and row[4] == "linear"]
WITHOUT = [row for row in VALID if row[2] == "none"]


def test_the_matrix_is_that_of_the_recipe() -> None:
    names = ("merge", "method", "momentum", "disagreement", "routing")
    assert [FIELDS[name].choices for name in names] == [MERGES, METHODS, MOMENTA, POINTS, ROUTINGS]
    assert len(VALID) == 3 * (2 * (2 * 6 + 3) + 4 + 3 + 1)
    assert len(WITHOUT) == 3 * 18


@pytest.mark.parametrize("row", [row for row in ALL if row not in VALID], ids="-".join)
def test_senseless_combinations_are_refused(row: Row) -> None:
    with pytest.raises(RecipeError, match="found"):
        Recipe(**fields(*row))


@pytest.mark.parametrize("row", VALID, ids="-".join)
def test_all_others_are_a_recipe(row: Row) -> None:
    assert Recipe.from_dict(Recipe(**fields(*row)).to_dict()) == Recipe(**fields(*row))


PROBE = torch.arange(3, 25).reshape(2, 11)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("row", WITH_MOMENTUM, ids="-".join)
def test_every_combination_with_a_momentum_works(odd, tmp_path: Path, family: str, row: Row) -> None:
    """Both paths give one model, bit for bit; it speaks, and differs from the original."""
    source, recipe = odd(family, torch.float32, tokenizer=True), Recipe(**fields(*row))
    patch_checkpoint(source, tmp_path / "out", recipe)
    original = aligned(AutoModelForCausalLM.from_pretrained(source))
    before = original(input_ids=PROBE).logits
    stored, live = aligned(load_patched(tmp_path / "out")), aligned(patch_model(original, recipe))
    assert type(stored) is type(live)
    assert differing(stored.state_dict(), live.state_dict()) == []
    logits = stored(input_ids=PROBE).logits
    assert torch.equal(logits, live(input_ids=PROBE).logits)
    assert logits.isfinite().all()
    assert not torch.equal(logits, before)


def shapes_of(source: Path, row: Row) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the result's tensors, from the source's and the words of the contract."""
    merge, method, _, _, routing = row
    config = read_config(source)
    hidden, width, top_k = (config[name] for name in ("hidden_size", "moe_intermediate_size", "num_experts_per_tok"))
    sizes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    shapes = {name: tuple(tensor.shape) for name, tensor in read_tensors(source).items()}
    count = config[experts_field(config)]
    for layer in moe_layers(config):
        block = f"model.layers.{layer}.mlp"
        if merge == "grouped":
            for expert, name in product(range(4, count), PROJECTIONS):
                del shapes[f"{block}.experts.{expert}.{name}.weight"]
            shapes[f"{block}.gate.weight"] = (4, hidden)
        elif merge == "narrow":
            inside = {name: shape for name, shape in shapes.items() if name.startswith(f"{block}.experts.")}
            shapes |= {name: tuple(4 if n == width else n for n in shape) for name, shape in inside.items()}
        elif method not in ("smear", "smoe"):
            shapes |= {f"{block}.base_expert.{name}.weight": size for name, size in sizes.items()}
        kept = 4 if merge == "grouped" else count
        rank = min(kept, hidden)
        parts = {"projection": (rank, hidden), "embeddings": (kept, rank), "scale": (1,)}
        if routing == "cosine":
            shapes |= {f"{block}.cosine_router.{name}": size for name, size in parts.items()}
        if routing == "stable":
            shapes[f"{block}.stable_router.assignment"] = (VOCAB, top_k)
    return shapes


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("row", WITHOUT, ids="-".join)
def test_every_other_combination_works(odd, words: Path, tmp_path: Path, family: str, row: Row) -> None:
    """What is written, and what it weighs; both paths give one model, bit for bit; it speaks, in one way at a time and
    all at once, and differs from the original unless that is the method."""
    text = {"calibration_data": str(words), "calibration_tokens": 256} if "stable" in row or "narrow" in row else {}
    source, recipe, out = odd(family, torch.float32, tokenizer=True), Recipe(**fields(*row), **text), tmp_path / "out"
    original, tokenizer = aligned(AutoModelForCausalLM.from_pretrained(source)), AutoTokenizer.from_pretrained(source)
    before = original(input_ids=PROBE).logits
    patch_checkpoint(source, out, recipe)

    written, stock = read_tensors(out), recipe.routing.kind == "linear" and (row[0] == "grouped" or row[1] == "smoe")
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == shapes_of(source, row)
    dtypes = {name: tensor.dtype for name, tensor in written.items() if tensor.dtype != torch.float32}
    tables = [f"model.layers.{layer}.mlp.stable_router.assignment" for layer in moe_layers(read_config(source))]
    assert dtypes == (dict.fromkeys(tables, torch.int32) if recipe.routing.kind == "stable" else {})
    assert make_plan(resolve(str(source)), recipe, "5GB").bytes_out == sum(t.nbytes for t in written.values())
    assert read_config(out)["model_type"] == (family if stock else f"namex_{family}")

    stored, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"] | info["mismatched_keys"]
    live = patch_model(original, recipe, tokenizer=tokenizer)
    again = load_patched(out)
    assert type(stored) is type(live) is type(again)
    held = [{**model.state_dict(), **dict(model.named_buffers())} for model in (stored, live, again)]
    assert differing(held[0], held[1]) == differing(held[0], held[2]) == []
    stored, live = aligned(stored), aligned(live)
    logits = stored(input_ids=PROBE).logits
    assert torch.equal(logits, live(input_ids=PROBE).logits)
    assert logits.isfinite().all()
    assert torch.equal(logits, before) == (row == ("residual", "smoe", "none", "zero", "linear"))

    is_causal(stored, logits)
    one_way_at_a_time(stored)
    for model in (stored, live):
        router_logits = model(input_ids=PROBE, output_router_logits=True).router_logits
        count = 4 if recipe.merge.kind == "grouped" else 7
        assert [tuple(layer.shape) for layer in router_logits] == [(PROBE.numel(), count)] * 3


def is_causal(model: Any, logits: torch.Tensor) -> None:
    """Another token moves what comes with and after it, and nothing before it."""
    for place in (3, 6, 10):
        other = PROBE.clone()
        other[:, place] = 51 - place
        moved = (model(input_ids=other).logits - logits).abs()
        assert moved[:, :place].max() < 2e-5
        assert moved[:, place:].amax(-1).min() > 1e-3


def one_way_at_a_time(model: Any) -> None:
    """Greedy decoding with a cache is the best next token of one pass over the whole text."""
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    spoken = model.generate(PROBE[:, :7], max_new_tokens=3, do_sample=False)
    assert spoken.shape == (2, 10)
    scores = model(input_ids=spoken).logits[:, 6:9]
    best = scores.max(-1).values - scores.gather(-1, spoken[:, 7:, None])[..., 0]
    assert best.max() < 1e-4
