"""Patched models under FSDP2 on two processes: the same step as on one, and no layer reads another layer's parameters.

`sharded_child.py` of the helpers goes through accelerate's own preparation, as a `Trainer` does.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from namex_hf import Recipe, load_patched, patch_checkpoint
from tests.helpers.process import HELPERS, run_pair

PROCESSES, BATCH, LENGTH, VOCABULARY = 2, 4, 96, 4096
RECIPES = {
    "residual": ("tiny", Recipe()),
    "soft": ("tiny", Recipe(merge="soft")),
    "deepseek": ("tiny-deepseek", Recipe()),
}
JOBS = [
    {"model": "residual", "checkpointing": False, "auxiliary": False},
    {"model": "residual", "checkpointing": True, "auxiliary": True},
    {"model": "soft", "checkpointing": True, "auxiliary": False},
    {"model": "soft", "checkpointing": False, "auxiliary": True},
    {"model": "deepseek", "checkpointing": True, "auxiliary": True},
]
over_jobs = pytest.mark.parametrize("job", range(len(JOBS)), ids=["-".join(map(str, job.values())) for job in JOBS])


def global_batch() -> torch.Tensor:
    """Token ids of one step, ``[batch, length]``; each sequence from a larger vocabulary, so that halves differ."""
    draw = torch.Generator().manual_seed(3)
    return torch.stack(
        [torch.randint(2, VOCABULARY >> (9 - 3 * row), (LENGTH,), generator=draw) for row in range(BATCH)]
    )


class Step(NamedTuple):
    """Of one job: what every process reports, and the whole gradients."""

    processes: list[dict[str, Any]]
    gradients: dict[str, torch.Tensor]


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
        {**job, "name": str(number), "folder": str(folders[job["model"]]), "tokens": global_batch().tolist()}
        for number, job in enumerate(JOBS)
    ]
    (out / "jobs.json").write_text(json.dumps(jobs))
    run_pair(HELPERS / "sharded_child.py", [out / "jobs.json", out], out)
    return [
        Step(
            [json.loads((out / f"{number}.{rank}.json").read_text()) for rank in range(PROCESSES)],
            load_file(out / f"{number}.safetensors"),
        )
        for number in range(len(JOBS))
    ]


def alone(folder: Path, auxiliary: bool, parts: int) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """One process: outputs of the global batch in `parts`, and the gradients of their mean loss."""
    model = load_patched(folder, dtype=torch.float32).train()
    outputs = []
    for tokens in global_batch().chunk(parts):
        outputs.append(model(tokens, labels=tokens, use_cache=False, output_router_logits=auxiliary))
        (outputs[-1].loss / parts).backward()
    return outputs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@over_jobs
def test_loss_and_gradients_are_those_of_one_process(steps, folders, job):
    """DeepSeek's auxiliary loss is a mean over sequences; Qwen's is a product of means over all tokens of a process."""
    chosen, step = JOBS[job], steps[job]
    of_all = chosen["model"] == "deepseek" or not chosen["auxiliary"]
    outputs, gradients = alone(folders[chosen["model"]], chosen["auxiliary"], 1 if of_all else PROCESSES)
    found = [process["loss"] for process in step.processes]
    assert sum(found) / PROCESSES == pytest.approx(sum(out.loss.item() for out in outputs) / len(outputs), rel=1e-6)
    assert abs(found[0] - found[1]) > 1e-3  # each has its own share of the batch
    assert step.gradients.keys() == gradients.keys()
    for name, wanted in gradients.items():
        assert wanted.abs().max() > 0
        assert (step.gradients[name] - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name


def test_qwens_auxiliary_loss_is_each_process_own(steps, folders):
    chosen, step = JOBS[1], steps[1]
    halves, gradients = alone(folders[chosen["model"]], True, PROCESSES)
    (whole,), of_whole = alone(folders[chosen["model"]], True, 1)
    found = [process["auxiliary"] for process in step.processes]
    assert found == pytest.approx([half.aux_loss.item() for half in halves], rel=1e-5)
    assert sum(found) / PROCESSES > 1.001 * whole.aux_loss.item()
    apart = max(((gradients[name] - of_whole[name]).norm() / of_whole[name].norm()).item() for name in gradients)
    assert apart > 1e-4  # what the comparison above would have to allow for


@over_jobs
def test_a_layer_finds_its_own_parameters_alone(steps, job):
    """While a layer's experts work, its base expert is whole and all other layers are shards: none can be read."""
    for process in steps[job].processes:
        assert all(process["at_rest"])
        mixtures = range(JOBS[job]["model"] == "deepseek", len(process["at_rest"]))
        forward = [[number] for number in mixtures]
        again = forward[::-1] if JOBS[job]["checkpointing"] else []
        assert process["whole"] == forward + again


@over_jobs
def test_embedding_and_head_stay_two(steps, job):
    assert not any(process["tied"] for process in steps[job].processes)
