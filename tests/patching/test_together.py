"""Several results from one reading of the text."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from namex_hf import Recipe
from namex_hf.calibration.decoder import DecoderLayer
from namex_hf.checkpoint.resolve import resolve
from namex_hf.errors import CheckpointError, OutputError
from namex_hf.patching import run as running
from namex_hf.patching.plan import Plan, make_plan
from namex_hf.patching.run import Run
from namex_hf.patching.together import run_all, share_reading
from tests.helpers.checkpoints import rewrite_tensors, settled_files
from tests.helpers.killing import Killing
from tests.helpers.process import SERVER
from tests.helpers.recipes import WIDE

PRUNED = {"merge": "grouped", "operator": "keep", "grouping": "none", "weighting": "saliency", "calibrate": "before"}
FITTED = {"fit": "layer", "fit_steps": 2, "calibrate": "before"}
Fields = dict[str, object]


def plans_of(source: Path, words: Path, *fields: Fields) -> list[Plan]:
    text = {"calibration_data": str(words), "calibration_tokens": 512}
    return [make_plan(resolve(str(source)), Recipe(**{**text, **one}), "100KB") for one in fields]


def narrow(*widths: int, **fields: object) -> list[Fields]:
    return [{"merge": "narrow", "width": width, **fields} for width in widths]


def runs_of(plans: list[Plan], out: Path) -> list[Run]:
    return [Run(plan, out / str(number)) for number, plan in enumerate(plans)]


def is_as_if_made_alone(run: Run, folder: Path) -> None:
    alone = folder / "alone"
    run_all([Run(run.plan, alone, overwrite=True)])
    assert settled_files(run.out) == settled_files(alone)


def run_killed(source: Path, out: Path, words: Path, fields: list[Fields], what: str, times: int) -> None:
    """For a process of its own."""
    run_all(runs_of(plans_of(source, words, *fields), out), progress=Killing(what, times))


def killed(*arguments: object) -> None:
    process = SERVER.Process(target=run_killed, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -9


@pytest.mark.parametrize(
    "fields", [narrow(32, 24, 8), narrow(24, 8, **FITTED), [{**PRUNED, "experts": 4}, {**PRUNED, "experts": 3}]]
)
def test_each_is_as_if_made_alone(
    long_checkpoint: Path, words: Path, tmp_path: Path, fields: list[Fields], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the text goes through each layer once."""
    plans, tapped, tap = plans_of(long_checkpoint, words, *fields), Counter[int](), DecoderLayer.tap

    def counted(layer: DecoderLayer, hidden: torch.Tensor, *more: object) -> object:
        tapped[layer._index] += 1
        return tap(layer, hidden, *more)

    assert share_reading(runs_of(plans, tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(DecoderLayer, "tap", counted)
        reports = run_all(runs_of(plans, tmp_path))
    assert set(tapped.values()) == {2}  # and once as the first batch, which is compared
    assert len(tapped) == 12
    for run, report in zip(runs_of(plans, tmp_path), reports, strict=True):
        is_as_if_made_alone(run, tmp_path)
        assert report.run["recipe"] == run.plan.recipe.to_dict()
    assert run_all(runs_of(plans, tmp_path))[0].to_json() == reports[0].to_json()


def test_killed_runs_go_on_from_where_each_was(long_checkpoint: Path, words: Path, tmp_path: Path) -> None:
    """Also one that got further by itself, and one that was not begun."""
    fields = narrow(32, 24, 8)
    first, second, third = runs_of(plans_of(long_checkpoint, words, *fields), tmp_path)
    killed(long_checkpoint, tmp_path, words, fields[:1], "layer 6", 1)
    killed(long_checkpoint, tmp_path, words, fields[:2], "layer 3", 2)  # of the first it is said to be there already
    stages: list[str] = []
    run_all([first, second, third], progress=lambda event: stages.append(str(event)))
    assert stages.count("layer 2: narrowed") < stages.count("layer 12: narrowed")
    for run in (first, second, third):
        is_as_if_made_alone(run, tmp_path)


def test_what_ends_one_ends_all(
    odd: Callable[..., Path], words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad input leaves no folder; a full disk leaves all, to be continued."""
    source = odd("qwen2_moe", torch.bfloat16, shards=1, tokenizer=True, **WIDE)
    plans, name = plans_of(source, words, *narrow(8, 4)), "model.layers.2.mlp.experts.2.up_proj.weight"
    broken = shutil.copytree(source, tmp_path / "broken")
    rewrite_tensors(broken, lambda tensors: tensors[name].view(-1)[3:4].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=f"tensor {name} in model.safetensors holds NaN"):
        run_all(runs_of(plans_of(broken, words, *narrow(8, 4)), tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())

    def full(*_: object) -> None:
        raise OutputError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(running.State, "save", full)
        with pytest.raises(OutputError):
            run_all(runs_of(plans, tmp_path / "out"))
    assert len(list((tmp_path / "out").iterdir())) == 2
    run_all(runs_of(plans, tmp_path / "out"))
    for run in runs_of(plans, tmp_path / "out"):
        is_as_if_made_alone(run, tmp_path)


def test_room_is_that_of_all(
    long_checkpoint: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = plans_of(long_checkpoint, words, *narrow(24, 8))
    needed = sum(map(running.space_needed, plans))
    usage = running.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(running.shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(OutputError, match=f"the run needs {needed / 1e9:.2f} GB"):
        run_all(runs_of(plans, tmp_path))


def test_what_needs_readings_of_its_own(long_checkpoint: Path, words: Path) -> None:
    def share(*fields: Fields) -> bool:
        return share_reading(runs_of(plans_of(long_checkpoint, words, *fields), Path("out")))

    assert share(*narrow(24, 8))
    assert not share(*narrow(24, 8, calibrate="after"))
    assert not share(*narrow(24, 8, fit="layer"))  # which aims at what the layers below became
    assert not share(*narrow(24), *narrow(8, calibration_tokens=1024))
    residual = {"merge": "residual", "routing": "stable", "calibrate": "before"}
    assert not share(residual, {**residual, "gamma": 0.5})  # whose base goes from layer to layer
