"""One of two processes that train live models for one step: under FSDP2 through accelerate, or data parallel.

``python -m torch.distributed.run --nproc_per_node 2 live_child.py JOBS OUT``: JOBS is a JSON list of ``{"folder",
"name", "kind", "checkpointing", "tokens"}``, `kind` one of ``fsdp2``, ``ddp``. Every process takes its share of
`tokens`, ``[batch, length]``, in order. OUT receives ``NAME.safetensors``, whole gradients,
``NAME.state.safetensors``, the model as it would be saved, and ``NAME.RANK.json``.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from namex_hf import load_patched
from namex_hf.training.live import go_live, refresh


def accelerator_of(kind: str) -> Accelerator:
    """accelerate takes up FSDP for accelerators alone; on CPUs it is told that it did, and goes the same way."""
    accelerator = Accelerator(cpu=True)
    if kind != "ddp":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    return accelerator


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()).clone().contiguous()


def train(job: dict, out: Path) -> None:
    accelerator = accelerator_of(job["kind"])
    model = go_live(load_patched(job["folder"], dtype=torch.float32).train())
    if job["checkpointing"]:
        model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    model = accelerator.unwrap_model(wrapped)
    model.state_dict()  # may be taken before any pass
    tokens = torch.tensor(job["tokens"]).chunk(accelerator.num_processes)[accelerator.process_index]
    loss = wrapped(tokens, labels=tokens, use_cache=False).loss
    accelerator.backward(loss)
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    settled = refresh(model)
    state = {name: whole(tensor) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    if accelerator.is_main_process:
        save_file(gradients, out / f"{job['name']}.safetensors")
        save_file(state, out / f"{job['name']}.state.safetensors")
    found = {
        "loss": loss.item(),
        "sharded": [isinstance(layer, FSDPModule) for layer in model.model.layers],
        "at_rest": [isinstance(p, DTensor) for layer in model.model.layers for p in layer.parameters()],
        "weights": [game["weights"] for layer in settled for game in layer.record],
        "drifts": [layer.drift for layer in settled],
    }
    (out / f"{job['name']}.{accelerator.process_index}.json").write_text(json.dumps(found))
    accelerator.free_memory()
    accelerator.state._reset_state(reset_partial_state=False)


if __name__ == "__main__":
    for one in json.loads(Path(sys.argv[1]).read_text()):
        train(one, Path(sys.argv[2]))
    torch.distributed.destroy_process_group()
