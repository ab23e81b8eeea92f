"""What holds for every family under every recipe. A new family joins by a row of `FORMS`, its toy by one of `OWN`."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from namex_hf import Recipe, load_patched, patch_checkpoint
from namex_hf.checkpoint.resolve import resolve
from namex_hf.patching.plan import make_plan
from namex_hf.progress import ProgressEvent
from tests.helpers.checkpoints import (
    differing,
    experts_field,
    read_config,
    read_tensors,
    same_bits,
    settled_files,
)
from tests.helpers.recipes import CURVES, NARROW, PLAIN, ROUTED, SHRUNK, SOFT, WIDE, Fields, recipe_of, shrunk
from tests.helpers.runs import PROBE, live, load, logits

Form = tuple[torch.dtype, Fields]
FORMS: dict[str, tuple[Form, Form, Form]] = {
    "qwen2_moe": (
        (torch.float32, {"fuse": True}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {}),
    ),
    "deepseek": (
        (torch.bfloat16, {"fuse": True}),
        (torch.float32, {"norm_topk_prob": True}),
        (torch.float32, {"n_routed_experts": 20}),
    ),
}
"""Two forms of a family's checkpoint, of two dtypes and layouts; the third stands for the second where a recipe needs
gate values that leave mass."""
RECIPES: dict[str, Fields] = {
    **{f"plain-{name}": fields for name, fields in PLAIN.items()},
    **{f"shrunk-{name}": shrunk(fields) for name, fields in SHRUNK.items()},
    **{f"curved-{name}": {**SOFT, **fields} for name, fields in CURVES.items()},
    **{f"routed-{name}": fields for name, fields in ROUTED.items()},
    "narrow": NARROW,
    "narrow-layer": {**NARROW, "fit": "layer"},
    "narrow-fewer": {"merge": "grouped", "experts": 4, "width": 16, "fit": "layer"},
}
HALF = {"plain-namex", "plain-smear"}
"""In float16."""
TWICE = {f"shrunk-{name}" for name in ("fit", "before", "diagonal", "hc-smoe", "gates", "refit", "one")}
TWICE |= {"narrow", "narrow-layer", "narrow-fewer"}
"""In both forms; of the others every second one is in the first."""
EVERY_KIND = (
    *("plain-namex-full", "plain-camex", "plain-smoe", "plain-soft", "plain-smear", "plain-grouped"),
    *("shrunk-fit", "shrunk-layer", "shrunk-reap", "curved-namex-full", "routed-cosine-grouped"),
    *("routed-entropy-residual", "routed-stable-smoe", "routed-kronecker", "narrow", "narrow-layer", "narrow-fewer"),
)
"""A recipe of every kind of result."""


def renormalises(fields: Fields) -> bool:
    """Whether gate values may sum to 1 under this recipe."""
    return fields.get("merge") in ("grouped", "soft", "narrow") and fields.get("routing", "linear") == "linear"


def sizes(name: str) -> Fields:
    """Changes of the toy that a recipe needs."""
    return WIDE if name.startswith("narrow") else {}


def cells() -> Iterator[tuple[str, str, torch.dtype, Fields]]:
    """Family, recipe, dtype, changes of the source."""
    for number, (name, fields) in enumerate(RECIPES.items()):
        for family, (first, renormalised, other) in FORMS.items():
            second = renormalised if renormalises(fields) else other
            forms = (first, second) if name in TWICE else ((first, second)[number % 2],)
            for dtype, changes in forms:
                yield family, name, torch.float16 if name in HALF else dtype, {**changes, **sizes(name)}


CELLS = {
    f"{family}-{name}-{str(dtype)[6:]}": (family, name, dtype, changes) for family, name, dtype, changes in cells()
}


@pytest.mark.parametrize("cell", CELLS)
def test_disk_equals_memory(odd, words: Path, tmp_path: Path, cell: str) -> None:
    """The folder, loaded, and `patch_model` on the live original: the same class, numbers and logits, bit for bit.

    What a run weighs is known before.
    """
    family, name, dtype, changes = CELLS[cell]
    source, recipe = odd(family, dtype, tokenizer=True, **changes), recipe_of(words, RECIPES[name])
    patch_checkpoint(source, tmp_path / "out", recipe)
    stored, patched = load(tmp_path / "out"), live(source, recipe)
    assert type(stored) is type(patched)
    held = [{**model.state_dict(), **dict(model.named_buffers())} for model in (stored, patched)]
    assert differing(*held) == []
    assert same_bits(logits(stored), logits(patched))
    assert logits(stored).isfinite().all()
    told = recipe if not recipe.needs_text else replace(recipe, calibration_data=words.name)
    assert stored.config.namex == patched.config.namex == told.to_stored()
    for field in ("moe_intermediate_size", *(["n_shared_experts"] if family == "deepseek" else [])):
        changed = {"moe_intermediate_size": 16, "n_shared_experts": 5} if recipe.to_dict()["width"] else {}
        assert getattr(stored.config, field) == changed.get(field, read_config(source)[field])
        assert getattr(stored.config, field) == getattr(patched.config, field)
    for field in (experts_field(read_config(source)), "num_experts_per_tok"):
        assert getattr(stored.config, field) == getattr(patched.config, field)
        if recipe.merge.kind == "grouped":
            count = recipe.to_dict()["experts"]
            assert getattr(stored.config, field) == (count if field != "num_experts_per_tok" else min(count, 3))
    written = read_tensors(tmp_path / "out")
    floats = {tensor.dtype for name, tensor in written.items() if not name.endswith("stable_router.assignment")}
    assert floats == {dtype}
    assert make_plan(resolve(str(source)), recipe, "5GB").bytes_out == sum(t.nbytes for t in written.values())


class Stop(BaseException):
    pass


@dataclass
class Patched:
    """A cell's source in float32, its recipe, and its result."""

    source: Path
    recipe: Recipe
    folder: Path

    @cached_property
    def events(self) -> list[ProgressEvent]:
        """What is told of the run that has written the result."""
        found: list[ProgressEvent] = []
        patch_checkpoint(self.source, self.folder, self.recipe, shard_size="20KB", progress=found.append)
        return found

    def model(self) -> Any:
        assert self.events
        return load_patched(self.folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def patched(request: pytest.FixtureRequest, odd, words: Path, tmp_path_factory: pytest.TempPathFactory) -> Patched:
    family, name = request.param
    folder = tmp_path_factory.mktemp("cell") / "out"
    source = odd(family, torch.float32, tokenizer=True, **sizes(name))
    return Patched(source, recipe_of(words, RECIPES[name], tokens=512), folder)


every_kind = pytest.mark.parametrize(
    "patched", [(f, name) for f in FORMS for name in EVERY_KIND], ids="-".join, indirect=True, scope="module"
)


@every_kind
def test_a_stopped_run_goes_on_to_the_same_bytes(patched: Patched, tmp_path: Path) -> None:
    left = len(patched.events) // 2

    def stop(_: ProgressEvent) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Stop

    with pytest.raises(Stop):
        patch_checkpoint(patched.source, tmp_path / "out", patched.recipe, shard_size="20KB", progress=stop)
    assert (tmp_path / "out" / ".namex").is_dir()
    patch_checkpoint(patched.source, tmp_path / "out", patched.recipe, shard_size="20KB")
    assert settled_files(tmp_path / "out") == settled_files(patched.folder)


@every_kind
def test_cached_generation_equals_uncached(patched: Patched) -> None:
    model = patched.model()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    with_cache, without = (
        model.generate(PROBE, max_new_tokens=6, do_sample=False, use_cache=cached) for cached in (True, False)
    )
    assert with_cache.shape == (2, 15)
    assert torch.equal(with_cache, without)


@every_kind
def test_one_training_step_lowers_the_loss(patched: Patched) -> None:
    """Experts have gradients, and every parameter that learns stays finite."""
    model = patched.model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = model(PROBE, labels=PROBE).loss
    before.backward()
    learnt = [parameter for parameter in model.parameters() if parameter.grad is not None]
    assert all(parameter.grad.isfinite().all() for parameter in learnt)
    experts = [
        name for name, parameter in model.named_parameters() if ".experts." in name and parameter.grad is not None
    ]
    assert experts
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in learnt)
    assert model(PROBE, labels=PROBE).loss < before
