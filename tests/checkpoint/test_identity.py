"""The identity of a source: times and sizes first, bytes where they differ; and the list of a result's files."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from namex_hf import Recipe, patch_checkpoint
from namex_hf.checkpoint.header import read_header
from namex_hf.checkpoint.identity import hash_weights
from namex_hf.checkpoint.source import open_checkpoint
from namex_hf.errors import CheckpointError, OutputError
from namex_hf.files import hash_file
from namex_hf.progress import ProgressEvent
from tests.helpers.checkpoints import all_files, read_tensors, same_bits, settled_files
from tests.helpers.toy_models import odd_checkpoint

HASH = "xxh3_128"
TENSOR = "model.layers.2.mlp.experts.3.up_proj.weight"
SMALL = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]
GROUPED = Recipe(merge="grouped", experts=4)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = odd_checkpoint(tmp_path / "source", "deepseek", torch.bfloat16, tokenizer=True)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def holding(folder: Path, tensor: str) -> Path:
    return next(path for path in folder.glob("model*.safetensors") if tensor in load_file(path))


def train(folder: Path, tensor: str = TENSOR, keep_times: bool = False) -> Path:
    """Another number in a tensor: names, shapes, sizes and places stay."""
    path = holding(folder, tensor)
    stat, tensors = path.stat(), {name: found.clone() for name, found in load_file(path).items()}
    tensors[tensor].view(-1)[-1] += 1
    save_file(tensors, path, {"format": "pt"})
    assert path.stat().st_size == stat.st_size
    if keep_times:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return path


def touch(folder: Path) -> None:
    for path in folder.iterdir():
        path.touch()


def report_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "namex/report.json").read_text())


def refused(source: Path, out: Path, *names: str, recipe: Recipe | None = None) -> None:
    before = all_files(out)
    with pytest.raises(OutputError, match=r"belongs to a run with another source; use --overwrite") as caught:
        patch_checkpoint(source, out, recipe)
    assert str(caught.value).endswith(f"({', '.join(sorted(names))}: other bytes)")
    assert all_files(out) == before


def test_a_touched_or_copied_source_is_the_same_source(source: Path, tmp_path: Path) -> None:
    patch_checkpoint(source, tmp_path / "out")
    before = all_files(tmp_path / "out")
    touch(source)
    patch_checkpoint(source, tmp_path / "out")
    copy = Path(shutil.copytree(source, tmp_path / "copy", copy_function=shutil.copyfile))
    patch_checkpoint(copy, tmp_path / "out")
    assert all_files(tmp_path / "out") == before


@pytest.mark.parametrize("keep_times", [False, True])
def test_other_weights_of_the_same_header_are_another_source(source: Path, tmp_path: Path, keep_times: bool) -> None:
    """Also where the time of change was set back. ``overwrite`` makes the folder of the weights as they are."""
    patch_checkpoint(source, tmp_path / "out")
    old = open_checkpoint(source).fingerprint()
    changed = train(source, keep_times=keep_times)
    assert open_checkpoint(source).fingerprint() == old
    refused(source, tmp_path / "out", changed.name)
    patch_checkpoint(source, tmp_path / "out", overwrite=True)
    assert same_bits(read_tensors(tmp_path / "out")[TENSOR], read_tensors(source)[TENSOR])
    patch_checkpoint(source, tmp_path / "fresh")
    assert settled_files(tmp_path / "out") == settled_files(tmp_path / "fresh")


@pytest.mark.parametrize("name", SMALL)
def test_other_small_files_are_another_source(source: Path, tmp_path: Path, name: str) -> None:
    patch_checkpoint(source, tmp_path / "out")
    data = (source / name).read_bytes()
    (source / name).write_bytes(data.replace(b"{", b"{ ", 1))
    refused(source, tmp_path / "out", name)
    (source / name).unlink()
    refused(source, tmp_path / "out", name)
    (source / name).write_bytes(data)
    patch_checkpoint(source, tmp_path / "out")


def test_overwrite_makes_anew_what_is_complete(source: Path, tmp_path: Path) -> None:
    patch_checkpoint(source, tmp_path / "out")
    (tmp_path / "out/namex/report.html").write_text("of the run before")
    before = all_files(tmp_path / "out")
    patch_checkpoint(source, tmp_path / "out", overwrite=True)
    after = all_files(tmp_path / "out")
    assert before.keys() - after.keys() == {"namex/report.html"}
    assert {name for name in after if after[name][1] == before[name][1]} == set(), "every file is written again"
    assert not (tmp_path / "out/.namex").exists()


def test_a_folder_of_an_older_release_is_refused_and_replaced(source: Path, tmp_path: Path) -> None:
    patch_checkpoint(source, tmp_path / "out")
    report = report_of(tmp_path / "out")
    del report["run"]["files"], report["files"]
    (tmp_path / "out/namex/report.json").write_text(json.dumps(report))
    with pytest.raises(OutputError, match=r"use --overwrite or another folder \(it does not say of which bytes"):
        patch_checkpoint(source, tmp_path / "out")
    patch_checkpoint(source, tmp_path / "out", overwrite=True)
    patch_checkpoint(source, tmp_path / "out")


# A Hub cache


@pytest.fixture
def cached(source: Path, tmp_path: Path) -> Path:
    """A snapshot of links, as huggingface_hub lays them out."""
    commit = "0123456789" * 4
    snapshot, blobs = tmp_path / "hub/models--a--b/snapshots" / commit, tmp_path / "hub/models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        blob = f"{number:064x}"
        shutil.copy(path, blobs / blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob)
    return snapshot


def test_in_a_hub_cache_the_blobs_name_is_the_identity(cached: Path, tmp_path: Path) -> None:
    patch_checkpoint(cached, tmp_path / "out")
    files = report_of(tmp_path / "out")["run"]["files"]
    assert {name: found["blob"] for name, found in files.items()} == {
        path.name: path.readlink().name for path in cached.iterdir() if path.name in files
    }
    weights = [path.name for path in cached.glob("model*.safetensors")]
    assert weights
    assert all(HASH not in files[name] for name in weights), "a blob's name is a hash already"
    touch(cached)
    patch_checkpoint(cached, tmp_path / "out")
    other = cached.parents[1] / "blobs" / ("f" * 64)
    shutil.copy(cached / weights[0], other)
    (cached / weights[0]).unlink()
    (cached / weights[0]).symlink_to(Path("../../blobs") / other.name)
    refused(cached, tmp_path / "out", weights[0])


def test_a_link_elsewhere_is_no_blob(source: Path, tmp_path: Path) -> None:
    """Links to weights in a folder below: what they point to is known by its bytes."""
    store = source / "store"
    store.mkdir()
    for path in list(source.glob("model*.safetensors")):
        path.rename(store / path.name)
        path.symlink_to(Path("store") / path.name)
    patch_checkpoint(source, tmp_path / "out")
    touch(store)
    patch_checkpoint(source, tmp_path / "out")
    refused(source, tmp_path / "out", train(store).name)


# Hashes


def by_hand(path: Path) -> str:
    """Of the hashes of the header and of all tensors, in the order of their places."""
    data = path.read_bytes()
    spans = sorted((span.begin, span.size) for span in read_header(path).values())
    parts = [data[: spans[0][0]], *(data[begin : begin + size] for begin, size in spans)]
    return xxhash.xxh3_128(b"".join(xxhash.xxh3_128(part).hexdigest().encode() for part in parts)).hexdigest()


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(
    "recipe",
    [Recipe(), GROUPED, Recipe(method="smoe"), Recipe(merge="soft", curvature="kronecker", rank=2)],
    ids=["residual", "grouped", "smoe", "soft"],
)
def test_hashes_of_source_and_result(odd: Callable[..., Path], tmp_path: Path, recipe: Recipe, fuse: bool) -> None:
    """Made while bytes are read and written, they are those of the files."""
    source, out = odd("qwen2_moe", torch.bfloat16, fuse=fuse, tokenizer=True), tmp_path / "out"
    patch_checkpoint(source, out, recipe, shard_size="60KB")
    report = report_of(out)
    for shard in source.glob("model*.safetensors"):
        assert report["run"]["files"][shard.name][HASH] == by_hand(shard) == hash_weights(shard)
    rewritten = {"README.md", "namex/report.json"}
    assert report["files"].keys() == all_files(out).keys() - rewritten
    for name, listed in report["files"].items():
        path = out / name
        assert listed["bytes"] == path.stat().st_size
        assert listed[HASH] == (by_hand(path) if path.suffix == ".safetensors" else hash_file(path)), name


def test_a_source_that_changes_under_the_run(source: Path, tmp_path: Path) -> None:
    """Layers of two models in one folder: refused, and nothing is left."""

    def changing(event: ProgressEvent) -> None:
        if str(event) == "layer 2":
            train(source, "model.norm.weight")

    with pytest.raises(CheckpointError, match=r"model-.*\.safetensors was changed while it was read"):
        patch_checkpoint(source, tmp_path / "out", progress=changing)
    assert not (tmp_path / "out").exists()


# Unfinished runs


class Stop(BaseException):
    """As a kill: nothing handles it."""


def stopped(source: Path, out: Path, recipe: Recipe, what: str, **options: Any) -> None:
    def stop(event: ProgressEvent) -> None:
        if str(event) == what:
            raise Stop

    with pytest.raises(Stop):
        patch_checkpoint(source, out, recipe, progress=stop, **options)
    assert not (out / "config.json").exists()


@pytest.mark.parametrize("recipe", [Recipe(), GROUPED], ids=["residual", "grouped"])
def test_an_unfinished_run_of_other_bytes_is_refused(source: Path, tmp_path: Path, recipe: Recipe) -> None:
    out = tmp_path / "out"
    stopped(source, out, recipe, "layer 2", shard_size="10KB")
    touch(source)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("model*")}
    kept = Path(shutil.copytree(out, tmp_path / "kept"))
    name = "model.layers.1.mlp.experts.0.down_proj.weight"  # it was read
    changed = train(source, name)
    with pytest.raises(OutputError, match=f"another source.*{changed.name}: other bytes"):
        patch_checkpoint(source, out, recipe, shard_size="10KB")
    patch_checkpoint(source, out, recipe, shard_size="10KB", overwrite=True)
    patch_checkpoint(source, tmp_path / "fresh", recipe, shard_size="10KB")
    assert settled_files(out) == settled_files(tmp_path / "fresh")
    assert before.keys() == {path.name for path in kept.glob("model*")}


@pytest.mark.parametrize("recipe", [Recipe(), GROUPED], ids=["residual", "grouped"])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.3.mlp.experts.0.down_proj.weight"])
def test_bytes_that_nothing_was_made_of_yet(source: Path, tmp_path: Path, recipe: Recipe, name: str) -> None:
    """Refused, or made anew: never a tensor of the old source."""
    out = tmp_path / "out"
    stopped(source, out, recipe, "layer 1", shard_size="10KB")
    train(source, name)
    try:
        patch_checkpoint(source, out, recipe, shard_size="10KB")
    except OutputError:
        patch_checkpoint(source, out, recipe, shard_size="10KB", overwrite=True)
    patch_checkpoint(source, tmp_path / "fresh", recipe, shard_size="10KB")
    assert settled_files(out) == settled_files(tmp_path / "fresh")


def test_an_unfinished_run_of_a_touched_source_goes_on(source: Path, tmp_path: Path) -> None:
    """All tensors were read: the bytes are known to be the same, and no layer is made again."""
    out, layers = tmp_path / "out", []
    last = max(int(name.split(".")[2]) for name in read_tensors(source) if ".experts." in name)
    stopped(source, out, Recipe(), f"layer {last}")
    touch(source)
    state = {path.name: path.stat().st_mtime_ns for path in (out / ".namex").glob("layer-*")}

    def look(event: ProgressEvent) -> None:
        layers.append({path.name: path.stat().st_mtime_ns for path in (out / ".namex").glob("layer-*")})

    patch_checkpoint(source, out, progress=look)
    assert layers[-1] == state
    patch_checkpoint(source, tmp_path / "fresh")
    assert settled_files(out) == settled_files(tmp_path / "fresh")


def test_a_run_that_overwrites_goes_on_by_the_same_command(source: Path, tmp_path: Path) -> None:
    patch_checkpoint(source, tmp_path / "out")
    stopped(source, tmp_path / "out", Recipe(), "layer 2", overwrite=True)
    first = (tmp_path / "out/.namex/layer-00001.safetensors").stat().st_mtime_ns
    stopped(source, tmp_path / "out", Recipe(), "layer 3", overwrite=True)
    assert (tmp_path / "out/.namex/layer-00001.safetensors").stat().st_mtime_ns == first
    patch_checkpoint(source, tmp_path / "out", overwrite=True)
    patch_checkpoint(source, tmp_path / "fresh")
    assert settled_files(tmp_path / "out") == settled_files(tmp_path / "fresh")
