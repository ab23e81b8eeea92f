"""One of several processes that train a patched folder for one step under FSDP2, through accelerate as `Trainer` does.

``python -m torch.distributed.run --nproc_per_node 2 sharded_child.py JOBS OUT``: JOBS is a JSON list of
``{"folder", "name", "checkpointing", "auxiliary", "tokens"}``. Every process takes its share of `tokens`, ``[batch,
length]``, in order. OUT receives ``NAME.safetensors``, the whole gradients, and ``NAME.RANK.json``: loss, local bytes,
and what was sharded when.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from namex_hf import load_patched


def accelerator_of() -> Accelerator:
    """accelerate takes up FSDP for accelerators alone; on CPUs it is told that it did, and goes the same way."""
    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    return accelerator


def is_sharded(module: torch.nn.Module) -> bool:
    """Whether a module's parameters are shards; they are so all, or none."""
    kinds = {isinstance(parameter, DTensor) for parameter in module.parameters()}
    assert len(kinds) == 1
    return kinds.pop()


def watch(layers, seen: list[list[int]]) -> None:
    """Note, whenever the experts of a layer begin to work, which layers are whole."""

    def note(module, args, kwargs) -> None:
        seen.append([number for number, layer in enumerate(layers) if not is_sharded(layer)])

    for layer in layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.register_forward_pre_hook(note, with_kwargs=True)


def local_bytes(tensors) -> int:
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def train(job: dict, out: Path) -> None:
    accelerator = accelerator_of()
    model = load_patched(job["folder"], dtype=torch.float32).train()
    if job["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    layers = model.model.layers
    at_rest = [is_sharded(layer) for layer in layers]
    whole: list[list[int]] = []
    watch(layers, whole)
    tokens = torch.tensor(job["tokens"]).chunk(accelerator.num_processes)[accelerator.process_index]
    output = model(tokens, labels=tokens, use_cache=False, output_router_logits=job["auxiliary"])
    accelerator.backward(output.loss)
    gradients = {name: p.grad.full_tensor().contiguous() for name, p in model.named_parameters() if p.grad is not None}
    held = {"gradients": local_bytes(p.grad for p in model.parameters() if p.grad is not None)}
    optimizer.step()
    states = optimizer.optimizer.state.values()
    held |= {
        "weights": local_bytes(model.parameters()),
        "moments": local_bytes(state[name] for state in states for name in ("exp_avg", "exp_avg_sq")),
    }
    if accelerator.is_main_process:
        save_file(gradients, out / f"{job['name']}.safetensors")
    found = {
        "loss": output.loss.item(),
        "auxiliary": None if output.aux_loss is None else output.aux_loss.item(),
        "at_rest": at_rest,
        "whole": whole,
        "bytes": held,
        "tied": model.lm_head.weight is model.model.embed_tokens.weight,
    }
    (out / f"{job['name']}.{accelerator.process_index}.json").write_text(json.dumps(found))
    accelerator.free_memory()
    accelerator.state._reset_state(reset_partial_state=False)


if __name__ == "__main__":
    for one in json.loads(Path(sys.argv[1]).read_text()):
        train(one, Path(sys.argv[2]))
    torch.distributed.destroy_process_group()
