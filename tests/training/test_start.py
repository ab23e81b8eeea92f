"""What training starts from: found and checked before a tensor is read, then patched as the checkpoint path does it."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from namex_hf.checkpoint.resolve import PACKAGED
from namex_hf.errors import CalibrationError, CheckpointError, FamilyError, RecipeError, TrainingError
from namex_hf.patching.patch import patch_checkpoint
from namex_hf.recipe import Recipe
from namex_hf.training.start import Start, dtype_of, start_from
from tests.helpers.checkpoints import change_config
from tests.helpers.toy_models import save_toy

MODELS = ("tiny", "tiny-deepseek")
RECIPES = {
    "smoe": Recipe(method="smoe"),
    "residual": Recipe(),
    "soft": Recipe(merge="soft", curvature="kronecker"),
    "cosine": Recipe(routing="cosine"),
    "grouped": Recipe(merge="grouped", experts=4),
}
STABLE = Recipe(routing="stable", calibration_tokens=8192)
IDS = torch.arange(50, 80).view(2, 15)


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`tiny` patched out of core, with every recipe."""
    folder = tmp_path_factory.mktemp("patched")
    for name, recipe in (RECIPES | {"stable": STABLE}).items():
        patch_checkpoint(PACKAGED / "tiny", folder / name, recipe)
    return {name: folder / name for name in (*RECIPES, "stable")}


# Stock checkpoints


@pytest.mark.parametrize("name", MODELS)
def test_a_packaged_model_with_nothing_said(name: str):
    start = start_from(name)
    assert (start.recipe, start.patched, start.context) == (Recipe(), False, 1024)
    assert start.source == {
        "name": name,
        "commit": None,
        "fingerprint": start.checkpoint.fingerprint(),
        "bytes": start.checkpoint.size,
        "patched": False,
    }
    header = (PACKAGED / name / "model.safetensors").stat().st_size - start.checkpoint.size
    assert 0 < header < 1 << 20
    assert start.tokenizer().chat_template


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_the_outline_is_the_model_without_its_numbers(name: str, recipe: str):
    start = start_from(name, recipe=RECIPES[recipe])
    outline, model = start.outline(), start.model(None)
    assert {parameter.device.type for parameter in outline.parameters()} == {"meta"}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert type(outline) is type(model)
    assert shapes(outline) == shapes(model)
    assert [name for name, _ in outline.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert model.config.namex == start.recipe.to_stored()
    assert model.name_or_path == model.config._name_or_path == name  # not where the package lies


@pytest.mark.parametrize("share", [{"keep": 0.5}, {"merge": "grouped", "keep": 0.5}])
def test_a_share_is_a_number_of_the_model(share: dict[str, Any]):
    """Of neurons or of experts: the run stores it, and its outline has the sizes that its model has."""
    start = start_from("tiny", recipe=Recipe(**share))
    stored = start.recipe.to_dict()
    assert (stored["keep"], stored["width"], stored["experts"]) == (
        None,
        *((None, 8) if "merge" in share else (40, None)),
    )
    assert shapes(start.outline()) == shapes(start.model(start.tokenizer()))


def test_in_memory_as_out_of_core(patched: dict[str, Path]):
    for name, folder in patched.items():
        recipe = RECIPES.get(name, STABLE)
        stock, found = start_from("tiny", recipe=recipe), start_from(str(folder))
        assert found.patched
        model, other = stock.model(stock.tokenizer()), found.model(None)
        assert type(model) is type(other)
        assert model.config.namex == other.config.namex
        state = other.state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items()), name
        assert set(model.state_dict()) == set(state)


def test_options_reach_the_model():
    model = start_from("tiny").model(None, dtype=torch.float32, attn_implementation="eager")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config._attn_implementation == "eager"
    assert start_from("tiny").model(None, dtype="auto").dtype == torch.bfloat16


def test_a_recipe_that_reads_text_needs_the_tokenizer():
    start = start_from("tiny", recipe=STABLE)
    with pytest.raises(CalibrationError, match="needs tokenizer="):
        start.model(None)
    tables = [layer.mlp.stable_router.assignment for layer in start.model(start.tokenizer()).model.layers]
    assert all((table >= 0).any() for table in tables)


def test_the_sparse_original_is_not_changed():
    model = start_from("tiny", recipe=RECIPES["smoe"]).model(None, dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(PACKAGED / "tiny", dtype=torch.float32)
    assert type(model) is type(original)
    assert torch.equal(logits(model), logits(original))
    assert not torch.equal(logits(start_from("tiny").model(None, dtype=torch.float32)), logits(original))


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bars_are_as_they_were(shown: bool):
    before = logging.is_progress_bar_enabled()
    switch = {True: logging.enable_progress_bar, False: logging.disable_progress_bar}
    switch[shown]()
    try:
        start_from("tiny").model(None)
        assert logging.is_progress_bar_enabled() is shown
        with pytest.raises(TypeError):
            start_from("tiny").model(None, no_such_option=1)
        assert logging.is_progress_bar_enabled() is shown
    finally:
        switch[before]()


# Patched folders


@pytest.mark.parametrize("name", [*RECIPES, "stable"])
def test_a_patched_folder_is_taken_as_it_is(name: str, patched: dict[str, Path]):
    start = start_from(str(patched[name]))
    recipe = RECIPES.get(name, STABLE)
    assert start.patched
    assert start.recipe.to_dict() == recipe.to_dict()
    assert start.source["patched"] is True
    assert start.context == 1024
    model, outline = start.model(None, dtype=torch.float32), start.outline()
    assert shapes(outline) == shapes(model)
    assert type(outline) is type(model)
    expected = AutoModelForCausalLM.from_pretrained(patched[name], dtype=torch.float32)
    assert torch.equal(logits(model), logits(expected))
    assert start.tokenizer()("a b")["input_ids"] == start_from("tiny").tokenizer()("a b")["input_ids"]


def test_a_patched_deepseek(tmp_path: Path):
    patch_checkpoint(PACKAGED / "tiny-deepseek", tmp_path / "out", Recipe(gamma=0.5))
    start = start_from(str(tmp_path / "out"))
    assert (start.patched, start.recipe) == (True, Recipe(gamma=0.5))
    assert shapes(start.outline()) == shapes(start.model(None))


def test_a_recipe_for_what_is_patched_already(patched: dict[str, Path]):
    with pytest.raises(TrainingError) as caught:
        start_from(str(patched["residual"]), recipe=Recipe())
    said = str(caught.value)
    assert said == "residual is patched already, so --recipe says nothing; accepted: none"


def test_a_patched_folder_of_another_recipe_is_refused_by_its_field(patched: dict[str, Path], tmp_path: Path):
    shutil.copytree(patched["residual"], tmp_path / "out")
    change_config(tmp_path / "out", namex={**Recipe().to_dict(), "later": 1})
    with pytest.raises(RecipeError, match=r"^unknown recipe field 'later'; accepted: merge, "):
        start_from(str(tmp_path / "out"))


# Refusals


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(merge="grouped", experts=17), "recipe field 'experts' is 17; this model has 16 a layer"),
        (Recipe(base="index:16"), "recipe field 'base' is 'index:16'; accepted here: index:0 to index:15"),
        (Recipe(merge="soft", top_k=20), "recipe field 'top_k' is 20; this model has 16 experts a layer"),
        (Recipe(device="nowhere"), "recipe field 'device' is 'nowhere'; accepted: a torch device that this machine ha"),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_that_does_not_fit(name: str, recipe: Recipe, message: str):
    with pytest.raises(RecipeError, match=f"^{message}"):
        start_from(name, recipe=recipe)


def test_no_such_model(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"^MODEL tinny: no such folder; .* did you mean 'tiny'\?$"):
        start_from("tinny")
    with pytest.raises(CheckpointError, match=r"^--revision main belongs to a Hub id; tiny is a local folder$"):
        start_from("tiny", "main")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        start_from(str(tmp_path))


@pytest.mark.parametrize("namex", [None, {}, Recipe().to_dict()])
def test_another_family(tmp_path: Path, namex: dict[str, Any] | None):
    change_config(save_toy(tmp_path / "toy"), model_type="llama", namex=namex)
    with pytest.raises(
        FamilyError,
        match=r"^model_type 'llama' is not a supported family: this is a mixture of experts; accepted: deepseek",
    ):
        start_from(str(tmp_path / "toy"))


def test_a_model_without_a_tokenizer(tmp_path: Path):
    start = start_from(str(save_toy(tmp_path / "toy")))
    assert start.model(None).config.namex == Recipe().to_stored()
    with pytest.raises(TrainingError) as caught:
        start.tokenizer()
    assert str(caught.value) == "toy has no tokenizer, and chats cannot be read without one"


@pytest.fixture
def sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one, and what accelerate tells its processes of FSDP where the first alone reads a model."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("sharded")
def test_a_stock_checkpoint_cannot_be_patched_in_pieces(patched: dict[str, Path]):
    with pytest.raises(
        TrainingError, match=r"^tiny is not patched, and cannot be where .*; accepted: a folder of namex"
    ):
        start_from("tiny").model(None)
    assert start_from(str(patched["residual"])).model(None).config.namex == Recipe().to_stored()


@pytest.mark.parametrize(("found", "context"), [(512, 512), (None, None)])
def test_the_context_is_stated_or_unknown(tmp_path: Path, found: Any, context: int | None):
    change_config(save_toy(tmp_path / "toy"), max_position_embeddings=found)
    assert start_from(str(tmp_path / "toy")).context == context


def test_dtypes():
    assert dtype_of("auto") == "auto"
    assert [dtype_of(name) for name in ("bfloat16", "float16", "float32")] == [
        torch.bfloat16,
        torch.float16,
        torch.float32,
    ]
    for name in ("float64", "bf16", "", "nn"):
        with pytest.raises(TrainingError) as caught:
            dtype_of(name)
        assert str(caught.value) == f"dtype is {name!r}; accepted: auto, bfloat16, float16, float32"


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path):
    """Bad tensors are found when the model is made, bad choices before."""
    folder = save_toy(tmp_path / "toy", tokenizer=True)
    start = start_from(str(folder))
    assert isinstance(start, Start)
    (folder / "model.safetensors").unlink()
    assert start.outline().config.namex == Recipe().to_stored()
    with pytest.raises(OSError, match="safetensors"):
        start.model(None)
