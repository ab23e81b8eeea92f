"""Live models on two processes, FSDP2 and data parallel: the loss, the gradients and the next bases of one process."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from namex_hf import Recipe, load_patched, patch_checkpoint
from namex_hf.errors import TrainingError
from namex_hf.training.live import go_live, refresh
from tests.helpers.process import HELPERS, run_pair

RECIPES = {
    "residual": ("tiny", Recipe(gamma=0.6, momentum="complex", beta="0.9,0.2618")),
    "soft": ("tiny-deepseek", Recipe(merge="soft", gamma=0.6, every=2)),
    "curved": ("tiny-deepseek", Recipe(merge="soft", gamma=0.6, method="ep-camex", curvature="kronecker")),
}
JOBS = [
    {"model": "residual", "kind": "fsdp2", "checkpointing": False},
    {"model": "residual", "kind": "fsdp2", "checkpointing": True},
    {"model": "soft", "kind": "fsdp2", "checkpointing": True},
    {"model": "soft", "kind": "ddp", "checkpointing": False},
    {"model": "curved", "kind": "fsdp2", "checkpointing": True},
]
over_jobs = pytest.mark.parametrize("job", range(len(JOBS)), ids=["-".join(map(str, job.values())) for job in JOBS])


def tokens() -> torch.Tensor:
    return torch.randint(2, 500, (4, 96), generator=torch.Generator().manual_seed(3))


class Step(NamedTuple):
    """Of one job: what every process reports, whole gradients, and the model as it would be saved."""

    processes: list[dict[str, Any]]
    gradients: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("patched")
    for name, (source, recipe) in RECIPES.items():
        patch_checkpoint(source, out / name, recipe)
    return {name: out / name for name in RECIPES}


@pytest.fixture(scope="module")
def steps(folders, tmp_path_factory: pytest.TempPathFactory) -> list[Step]:
    """All jobs, one after the other, in one pair of processes."""
    out = tmp_path_factory.mktemp("sharded")
    jobs = [
        {**job, "name": str(number), "folder": str(folders[job["model"]]), "tokens": tokens().tolist()}
        for number, job in enumerate(JOBS)
    ]
    (out / "jobs.json").write_text(json.dumps(jobs))
    run_pair(HELPERS / "live_child.py", [out / "jobs.json", out], out)
    return [
        Step(
            [json.loads((out / f"{number}.{rank}.json").read_text()) for rank in range(2)],
            load_file(out / f"{number}.safetensors"),
            load_file(out / f"{number}.state.safetensors"),
        )
        for number in range(len(JOBS))
    ]


@pytest.fixture(scope="module")
def alone(folders) -> dict[str, Step]:
    """The same step by one process, on the whole batch."""
    found = {}
    for name, folder in folders.items():
        model = go_live(load_patched(folder, dtype=torch.float32).train())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        loss = model(tokens(), labels=tokens(), use_cache=False).loss
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        weights = [game["weights"] for layer in refresh(model) for game in layer.record]
        found[name] = Step([{"loss": loss.item(), "weights": weights}], gradients, dict(model.state_dict()))
    return found


@over_jobs
def test_loss_and_gradients_are_those_of_one_process(steps, alone, job):
    step, wanted = steps[job], alone[JOBS[job]["model"]]
    losses = [process["loss"] for process in step.processes]
    assert sum(losses) / 2 == pytest.approx(wanted.processes[0]["loss"], rel=1e-6)
    assert abs(losses[0] - losses[1]) > 1e-3  # each has its own share of the batch
    assert step.gradients.keys() == wanted.gradients.keys()
    for name, gradient in wanted.gradients.items():
        assert gradient.any()
        assert (step.gradients[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


@over_jobs
def test_layers_are_shards_at_rest(steps, job):
    for process in steps[job].processes:
        assert set(process["sharded"]) == set(process["at_rest"]) == {JOBS[job]["kind"] == "fsdp2"}


@over_jobs
def test_the_next_weights_and_the_bases_that_would_be_saved_are_those_of_one_process(steps, alone, job):
    step, wanted = steps[job], alone[JOBS[job]["model"]]
    first, second = (torch.tensor(process["weights"]) for process in step.processes)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, torch.tensor(wanted.processes[0]["weights"]), rtol=1e-4, atol=0)
    bases = [name for name in step.state if "base_expert" in name]
    assert len(bases) == 3 * (5 if JOBS[job]["model"] == "residual" else 4)
    for name in bases:
        # AdamW's first step is as long where a gradient is nearly nothing, and rounding then has the say.
        off = (step.state[name] - wanted.state[name]).norm() / wanted.state[name].norm()
        assert off < 1e-3, name


def test_a_sharded_model_does_not_go_live(folders, monkeypatch):
    """Its layers have classes of FSDP2's making."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.fsdp import fully_shard

    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    model = load_patched(folders["residual"], dtype=torch.float32)
    init_process_group("gloo")
    try:
        for layer in model.model.layers:
            fully_shard(layer)
        with pytest.raises(TrainingError, match="found a FSDPNamexQwen2MoeDecoderLayer; accepted: a patched layer"):
            go_live(model)
    finally:
        destroy_process_group()
