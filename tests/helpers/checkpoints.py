"""Folders of checkpoints in tests: their names, how they are written, read, compared and changed.

Nothing here shares code with the package, so that what it takes for granted (names, which layers are mixtures) is
stated twice.
"""

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


INDEX = "model.safetensors.index.json"


def experts_field(config: dict[str, Any]) -> str:
    return "num_experts" if config["model_type"] == "qwen2_moe" else "n_routed_experts"


def experts_of(config: dict[str, Any]) -> int:
    return config[experts_field(config)]


def shared_name(config: dict[str, Any]) -> str:
    return "shared_expert" if config["model_type"] == "qwen2_moe" else "shared_experts"


def moe_layers(config: dict[str, Any]) -> list[int]:
    """By the words of the families' own documentation; loading with transformers says whether that is right."""
    layers = range(config["num_hidden_layers"])
    if config["model_type"] == "qwen2_moe":
        step, dense = config["decoder_sparse_step"], config["mlp_only_layers"]
        return [i for i in layers if i not in dense and (i + 1) % step == 0]
    return [i for i in layers if i >= config["first_k_dense_replace"] and i % config["moe_layer_freq"] == 0]


def write_folder(folder: Path, config: dict[str, Any], tensors: Tensors, shards: int = 1, seed: int = 0) -> Path:
    """Write a checkpoint; with several shards every tensor goes to one by lot, so that layers lie scattered."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    lot = random.Random(seed)
    files = [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    weight_map = {name: files[k] if k < shards else lot.choice(files) for k, name in enumerate(tensors)}
    for file in files:
        held = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(held, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def read_tensors(folder: Path) -> Tensors:
    """All tensors of a folder, by the safetensors library; an index must be right and complete."""
    files = sorted(folder.glob("model*.safetensors"))
    if len(files) == 1 and files[0].name == "model.safetensors":
        return load_file(files[0])
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    found: Tensors = {}
    for file in files:
        held = load_file(file)
        assert not held.keys() & found.keys()
        assert all(weight_map[name] == file.name for name in held)
        found |= held
    assert weight_map.keys() == found.keys()
    return found


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


def differing(one: Tensors, other: Tensors) -> list[str]:
    """Names that are in one alone, or whose bytes differ."""
    return sorted(
        name for name in {*one, *other} if name not in one or name not in other or not same_bits(one[name], other[name])
    )


def aligned(model: Any) -> Any:
    """The model with its parameters and buffers in fresh memory.

    Tensors mapped from a file lie wherever their header's length puts them, and matrix kernels round differently
    by alignment: equal numbers would give logits that differ in the last bit.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def settled_files(folder: Path) -> dict[str, bytes]:
    """What has to be byte-identical however often a run was killed: weights, index, config, recipe, statistics."""
    patterns: Iterable[str] = ("model*", "config.json", "namex/recipe.yaml", "namex/statistics.safetensors")
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for pattern in patterns for path in folder.glob(pattern)
    }


def all_files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def rewrite_tensors(folder: Path, change: Callable[[Tensors], None]) -> None:
    """Change the tensors of a one-file checkpoint in place."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def forget_files(folder: Path) -> None:
    """Take the list of files out of a folder's report, so that what is missing or changed is met where it is read."""
    path = folder / "namex" / "report.json"
    report = json.loads(path.read_text())
    del report["files"]
    path.write_text(json.dumps(report))


def change_config(folder: Path, **changes: Any) -> None:
    """Set fields of ``config.json``; None takes a field away."""
    config = json.loads((folder / "config.json").read_text())
    config |= changes
    (folder / "config.json").write_text(json.dumps({n: v for n, v in config.items() if v is not None}))
