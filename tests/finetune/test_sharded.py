"""The script on two CPU processes: FSDP2, and data parallel."""

import json
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import yaml

from namex_hf import Recipe, load_patched
from namex_hf.training.bargain import rebargain
from tests.helpers.process import places, script_process

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
"""What `accelerate launch` makes of a configuration file."""
SAME = {"optim": "sgd", "learning_rate": 0.05, "router_aux_loss_coef": 0.0, "scores": ["none"], "max_steps": 4}
"""So that gradients, and nothing that magnifies their rounding, make the result; the auxiliary loss is per process."""


def shard_on_cpus() -> None:
    """accelerate shards on accelerators alone; this is the only thing that it is told wrong."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    begin = AcceleratorState.__init__

    def pretend(self: Any, *args: Any, **kwargs: Any) -> None:
        if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        begin(self, *args, **kwargs)

    AcceleratorState.__init__ = pretend  # type: ignore[method-assign]


@pytest.fixture
def begin_two(script: Path, small: dict[str, Any]) -> Callable[..., list[BaseProcess]]:
    def begin(
        out: Path, environment: dict[str, str], pretend: bool = True, die: Any = None, **changes: Any
    ) -> list[BaseProcess]:
        config = out.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(small | {"per_device_train_batch_size": 1} | changes))
        arguments = ["--config", str(config), "--output_dir", str(out)]
        before = [shard_on_cpus] if environment and pretend else []
        before += [] if die is None else [partial(die, 3)]
        return [
            script_process(
                script,
                arguments,
                out.with_name(f"{out.name}.{place['RANK']}.{'pretend' if pretend else 'plain'}.log"),
                environment=environment | place,
                changes=before,
            )
            for place in places(2)
        ]

    return begin


def said(out: Path) -> str:
    return "\n".join(path.read_text("utf-8") for path in sorted(out.parent.glob(f"{out.name}.*.log")))


def losses(out: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((out / "namex/report.json").read_text())["training"]["loss"]]


def finished(processes: list[BaseProcess], out: Path) -> None:
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0], said(out)


@pytest.fixture(scope="module")
def one_process(run, tmp_path_factory) -> Path:
    ended = run(tmp_path_factory.mktemp("one") / "out", **SAME)
    assert ended.code == 0, ended.said
    return ended.out


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_fsdp2_trains_as_one_process_does(begin_two, one_process, tmp_path, gradient_checkpointing):
    out = tmp_path / "out"
    finished(begin_two(out, FSDP2, **SAME, gradient_checkpointing=gradient_checkpointing), out)
    assert (out / "checkpoint-4" / "pytorch_model_fsdp_0").is_dir()  # it was sharded
    assert losses(out) == pytest.approx(losses(one_process), rel=1e-5)
    found, wanted = load_patched(out), load_patched(one_process)
    assert type(found) is type(wanted)
    for (name, one), other in zip(found.state_dict().items(), wanted.state_dict().values(), strict=True):
        assert float((one - other).abs().max()) < 2e-6, name
    assert {path.name for path in out.glob("*.py")} == {path.name for path in one_process.glob("*.py")}
    for layer in rebargain(found, Recipe())[1:]:
        assert layer.drift < 1e-6


def test_fsdp2_killed_and_continued(begin_two, dying, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    finished(begin_two(whole, FSDP2, **SAME), whole)
    processes = begin_two(out, FSDP2, die=dying, **SAME)
    for process in processes:
        process.join()
    assert -9 in [process.exitcode for process in processes]
    assert not (out / "config.json").exists()
    finished(begin_two(out, FSDP2, **SAME), out)
    assert "going on from checkpoint-" in said(out)
    assert losses(out) == losses(whole)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_fsdp2_trains_a_live_model_as_one_process_does_killed_and_continued(run, begin_two, dying, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("gamma: 0.6\nmomentum: complex\n")
    live = {**SAME, "propagation": "live", "recipe": str(recipe), "save_steps": 1}
    alone, out = run(tmp_path / "alone", **live), tmp_path / "out"
    assert alone.code == 0, alone.said
    processes = begin_two(out, FSDP2, die=dying, **live, gradient_checkpointing=True)
    for process in processes:
        process.join()
    assert -9 in [process.exitcode for process in processes]
    finished(begin_two(out, FSDP2, **live, gradient_checkpointing=True), out)
    assert "going on from checkpoint-" in said(out)
    assert losses(out) == pytest.approx(losses(alone.out), rel=1e-5)
    found, wanted = load_patched(out), load_patched(alone.out)
    assert type(found) is type(wanted)
    for (name, one), other in zip(found.state_dict().items(), wanted.state_dict().values(), strict=True):
        assert float((one - other).abs().max()) < 2e-6, name


def test_data_parallel_trains_as_one_process_does(begin_two, one_process, tmp_path):
    out = tmp_path / "out"
    finished(begin_two(out, {}, **SAME), out)
    assert losses(out) == pytest.approx(losses(one_process), rel=1e-5)
    found, wanted = load_patched(out), load_patched(one_process)
    for (name, one), other in zip(found.state_dict().items(), wanted.state_dict().values(), strict=True):
        assert float((one - other).abs().max()) < 2e-6, name


@pytest.mark.parametrize(
    ("environment", "pretend", "changes", "text"),
    [
        (FSDP2, False, {}, "accelerate shards nothing on CPUs"),
        (FSDP2, True, {"use_peft": True, "train_kinds": ["experts"]}, "an adapter on a sharded model"),
    ],
    ids=["no accelerator", "adapter"],
)
def test_refused(begin_two, tmp_path, environment, pretend, changes, text):
    out = tmp_path / "out"
    processes = begin_two(out, environment, pretend, **SAME, **changes)
    for process in processes:
        process.join()
    assert all(process.exitcode for process in processes)
    assert "sft_smoltalk.py: error: " in said(out)
    assert text in said(out)
