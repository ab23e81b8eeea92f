"""Where the arithmetic runs: what ``auto`` is, and that an unfinished run goes on on the same kind of device."""

import json
from pathlib import Path

import pytest

from namex_hf import Recipe, patch_checkpoint
from namex_hf.checkpoint.folder import OutputFolder
from namex_hf.errors import OutputError, RecipeError
from namex_hf.patching.device import available, best_of, on_device
from namex_hf.progress import ProgressEvent
from tests.helpers.toy_models import save_toy

RUN = {"recipe": {"gamma": 1.0}}


@pytest.mark.parametrize(
    ("kinds", "device"), [((), "cpu"), (("mps",), "mps"), (("cuda",), "cuda"), (("mps", "cuda"), "cuda")]
)
def test_auto_is_the_best_that_is_available(kinds: tuple[str, ...], device: str) -> None:
    assert best_of(kinds) == device


def test_auto_is_settled_and_other_devices_stay() -> None:
    assert Recipe().device == "auto"
    assert on_device(Recipe()) == Recipe(device=best_of(available()))
    assert on_device(Recipe(device="cpu")).device == "cpu"
    with pytest.raises(RecipeError, match="'device' is 'abacus'; accepted: a torch device that this machine has"):
        on_device(Recipe(device="abacus"))


def test_a_run_is_continued_on_its_kind_of_device(tmp_path: Path) -> None:
    with OutputFolder(tmp_path, RUN, device="cuda").claimed(overwrite=False):
        (tmp_path / "model.safetensors").write_text("half")
    assert json.loads((tmp_path / ".namex/run.json").read_text()) == {**RUN, "device": "cuda"}
    OutputFolder(tmp_path, RUN, device="cuda").check(overwrite=False)
    other = OutputFolder(tmp_path, RUN, device="cpu")
    with pytest.raises(
        OutputError, match=r"begun on device cuda; this run is on cpu, .* --device cuda or --overwrite$"
    ):
        other.check(overwrite=False)
    with other.claimed(overwrite=True):
        assert not (tmp_path / "model.safetensors").exists()
    assert json.loads((tmp_path / ".namex/run.json").read_text()) == {**RUN, "device": "cpu"}


def test_a_run_says_its_device_and_its_result_does_not(tmp_path: Path) -> None:
    said = []

    def look(event: ProgressEvent) -> None:
        said.append(json.loads((tmp_path / "out/.namex/run.json").read_text())["device"])

    patch_checkpoint(save_toy(tmp_path / "model"), tmp_path / "out", progress=look)
    assert set(said) == {best_of(available())}
    assert "device" not in (tmp_path / "out/namex/report.json").read_text()
    assert "device" not in (tmp_path / "out/namex/recipe.yaml").read_text()
