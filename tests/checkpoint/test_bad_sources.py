"""Bad checkpoints: each is answered by one `CheckpointError` that names the file or tensor, and no folder is left."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from namex_hf import Recipe, patch_checkpoint
from namex_hf.checkpoint.header import read_header
from namex_hf.checkpoint.layout import left_out_line
from namex_hf.errors import CheckpointError, FamilyError
from tests.helpers.checkpoints import INDEX, differing, read_tensors, rewrite_tensors, write_folder
from tests.helpers.toy_models import fused, odd_checkpoint, odd_config, toy_tensors

SHARD = "model-00002-of-00003.safetensors"
RECIPES = {
    "residual": Recipe(),
    "grouped": Recipe(merge="grouped", experts=3),
    "smoe": Recipe(method="smoe"),
    "camex": Recipe(method="camex"),
    "smear": Recipe(method="smear", merge="soft"),
}


def refused(source: Path, *words: str, recipes: tuple[str, ...] = ("residual", "grouped", "smoe")) -> None:
    """Every form of the patch refuses ``source`` with all of ``words`` in one line and leaves no folder."""
    for name in recipes:
        out = source.parent / f"out-{name}"
        with pytest.raises(CheckpointError) as caught:
            patch_checkpoint(source, out, RECIPES[name])
        message = str(caught.value)
        assert all(word in message for word in words), message
        assert "\n" not in message
        assert not out.exists()


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return odd_checkpoint(tmp_path / "model", "qwen2_moe")


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return odd_checkpoint(tmp_path / "model", "deepseek", shards=1)


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Files and index


def test_missing_shard(sharded: Path) -> None:
    (sharded / SHARD).unlink()
    refused(sharded, SHARD, "missing")


def test_dangling_symlink(sharded: Path) -> None:
    (sharded / SHARD).unlink()
    (sharded / SHARD).symlink_to("nowhere.safetensors")
    refused(sharded, SHARD)


@pytest.mark.parametrize("place", ["../x.safetensors", "/abs/x.safetensors", "a\\b.safetensors", "sub/x", "..", "", 7])
def test_index_leaves_the_folder(sharded: Path, place: Any) -> None:
    edit_index(sharded, lambda names: names.update({"lm_head.weight": place}))
    refused(sharded, INDEX, "lm_head.weight", repr(place))


def test_index_leaves_the_folder_for_a_file_that_is_there(sharded: Path) -> None:
    """It is the name that counts: a file outside is not read though it exists and would fit."""
    (sharded / SHARD).rename(sharded.parent / SHARD)
    edit_index(sharded, lambda names: names.update({t: f"../{f}" for t, f in names.items() if f == SHARD}))
    refused(sharded, INDEX, f"../{SHARD}")


def test_index_names_what_a_shard_does_not_hold(sharded: Path) -> None:
    edit_index(sharded, lambda names: names.update({"model.extra.weight": SHARD}))
    refused(sharded, "model.extra.weight", SHARD)


def test_index_leaves_a_tensor_out(sharded: Path) -> None:
    edit_index(sharded, lambda names: names.pop("lm_head.weight"))
    refused(sharded, INDEX, "lm_head.weight")


def test_index_names_the_wrong_shard(sharded: Path) -> None:
    held = json.loads((sharded / INDEX).read_text())["weight_map"]["lm_head.weight"]
    other = next(f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3) if f"0000{k}-" not in held)
    edit_index(sharded, lambda names: names.update({"lm_head.weight": other}))
    refused(sharded, INDEX, "lm_head.weight", other)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000, "\udc80"])
def test_broken_index(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text, errors="surrogateescape")
    refused(sharded, INDEX, recipes=("residual",))


@pytest.mark.parametrize("text", ["", "{", "3", "[" * 100_000])
def test_broken_config(sharded: Path, text: str) -> None:
    (sharded / "config.json").write_text(text)
    refused(sharded, "config.json", recipes=("residual",))


def test_no_config(sharded: Path) -> None:
    (sharded / "config.json").unlink()
    refused(sharded, "config.json")


def test_no_weights(sharded: Path) -> None:
    for path in sharded.glob("model*"):
        path.unlink()
    refused(sharded, "model.safetensors", INDEX)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickles_only(sharded: Path, name: str) -> None:
    """Named, refused, and not opened: loading this one would stop the test."""
    for path in sharded.glob("model*"):
        path.unlink()
    (sharded / name).write_bytes(b"cos\n_exit\n(I3\ntR.")
    refused(sharded, name, "pickle", "safetensors")


def test_neither_folder_nor_name(tmp_path: Path) -> None:
    for source in (tmp_path / "nowhere", tmp_path, "no-such-model"):
        with pytest.raises(CheckpointError):
            patch_checkpoint(source, tmp_path.parent / "out-of-nothing")
    assert not (tmp_path.parent / "out-of-nothing").exists()


def test_folder_of_symlinks(sharded: Path, tmp_path: Path) -> None:
    """A Hub cache keeps its files elsewhere under names of hashes; the result is made of bytes, not of links."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0" / "model"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    patch_checkpoint(sharded, tmp_path / "plain")
    for number, path in enumerate(sorted(sharded.iterdir())):
        path.rename(blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(Path("../../../blobs") / f"{number:040x}")
    patch_checkpoint(snapshot, tmp_path / "linked")
    assert not any(path.is_symlink() for path in (tmp_path / "linked").iterdir())
    assert differing(read_tensors(tmp_path / "plain"), read_tensors(tmp_path / "linked")) == []


# Headers


def with_header(folder: Path, change: Callable[[dict[str, Any]], Any], pad: bytes = b"") -> None:
    """Change a one-file checkpoint's header and leave its data."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    changed = change(header)
    text = json.dumps(header if changed is None else changed).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :] + pad)


def in_order(header: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted((e for n, e in header.items() if n != "__metadata__"), key=lambda entry: entry["data_offsets"])


def test_truncated(single: Path) -> None:
    path = single / "model.safetensors"
    data = path.read_bytes()
    for keep in (0, 5, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:keep])
        refused(single, "model.safetensors", recipes=("residual",))


def test_padded(single: Path) -> None:
    with_header(single, lambda header: None, b"\0")
    refused(single, "model.safetensors", "padded")


@pytest.mark.parametrize("length", [10**9, 2**63, 2**64 - 1])
def test_header_longer_than_the_file(single: Path, length: int) -> None:
    path = single / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    refused(single, "model.safetensors", str(length))


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"[1]", b"null", b"[" * 100_000])
def test_header_is_no_object(single: Path, text: bytes) -> None:
    (single / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    refused(single, "model.safetensors", "header", recipes=("residual",))


def overlap(header: dict[str, Any]) -> None:
    one, other = in_order(header)[3:5]
    size = other["data_offsets"][1] - other["data_offsets"][0]
    other["data_offsets"] = [one["data_offsets"][0], one["data_offsets"][0] + size]


def hole(header: dict[str, Any]) -> None:
    last = in_order(header)[-1]
    last["data_offsets"] = [offset + 8 for offset in last["data_offsets"]]


def hole_in_between(header: dict[str, Any]) -> None:
    header.pop("model.layers.2.input_layernorm.weight")


@pytest.mark.parametrize(
    ("change", "word"), [(overlap, "overlaps"), (hole, "hole"), (hole_in_between, "hole")], ids=lambda v: str(v)[:20]
)
def test_layout_lies(single: Path, change: Callable[[dict[str, Any]], None], word: str) -> None:
    with_header(single, change)
    refused(single, "model.safetensors", word)


NAME = "model.layers.2.mlp.gate.weight"


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F7"},
        {"dtype": 3},
        {"dtype": ["BF16"]},
        {"shape": [7, -16]},
        {"shape": [7.0, 16]},
        {"shape": [True, 112]},
        {"shape": "7x16"},
        {"shape": None},
        {"shape": [7, 17]},
        {"shape": [2**62, 2**62]},
        {"data_offsets": [0]},
        {"data_offsets": [224, 0]},
        {"data_offsets": [-224, 0]},
        {"data_offsets": [10**15, 10**15 + 224]},
        {"data_offsets": "ab"},
        {"dtype": "F32"},
    ],
    ids=str,
)
def test_entry_lies(single: Path, entry: dict[str, Any]) -> None:
    with_header(single, lambda header: header[NAME].update(entry))
    refused(single, "model.safetensors", recipes=("residual",))


@pytest.mark.parametrize("entry", [None, 3, "x", [], {}, {"dtype": "BF16"}], ids=str)
def test_entry_is_none(single: Path, entry: Any) -> None:
    with_header(single, lambda header: {**header, NAME: entry})
    refused(single, "model.safetensors", NAME, recipes=("residual",))


def test_sound_header_is_read(single: Path) -> None:
    """The edits above start from a header that is accepted, and that says where the bytes are."""
    with_header(single, lambda header: None)
    tensors, spans = read_tensors(single), read_header(single / "model.safetensors")
    assert spans.keys() == tensors.keys()
    data = (single / "model.safetensors").read_bytes()
    for name, span in spans.items():
        assert (span.shape, span.dtype) == (tuple(tensors[name].shape), tensors[name].dtype)
        assert data[span.begin : span.begin + span.size] == tensors[name].view(torch.uint8).numpy().tobytes()


# Tensors against the configuration


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.experts.5.up_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.3.mlp.shared_experts.down_proj.weight",
    ],
)
def test_missing_tensor(single: Path, name: str) -> None:
    rewrite_tensors(single, lambda tensors: tensors.pop(name))
    refused(single, name, "missing")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.experts.5.down_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.3.mlp.shared_experts.up_proj.weight",
    ],
)
def test_wrong_shape(single: Path, name: str) -> None:
    rewrite_tensors(single, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    refused(single, name, "config.json")


def test_the_gate_of_the_shared_expert(tmp_path: Path) -> None:
    source, name = (
        odd_checkpoint(tmp_path / "model", "qwen2_moe", shards=1),
        "model.layers.2.mlp.shared_expert_gate.weight",
    )
    rewrite_tensors(source, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    refused(source, name, "config.json")
    rewrite_tensors(source, lambda tensors: tensors.pop(name))
    refused(source, name, "missing")


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_wrong_fused_shape(tmp_path: Path, name: str) -> None:
    source = odd_checkpoint(tmp_path / "model", "deepseek", fuse=True, shards=1)
    tensor = f"model.layers.2.mlp.experts.{name}"
    rewrite_tensors(source, lambda tensors: tensors.update({tensor: tensors[tensor].flatten(1)}))
    refused(source, tensor, "config.json")
    rewrite_tensors(source, lambda tensors: tensors.pop(tensor))
    refused(source, "model.layers.2.mlp.experts.0", "missing")


def test_experts_in_both_layouts(single: Path) -> None:
    """Which of the two is meant nobody can know: a tensor that is there twice is refused."""
    name = "model.layers.2.mlp.experts"

    def add(tensors: dict[str, torch.Tensor]) -> None:
        downs = [tensors[f"{name}.{expert}.down_proj.weight"] for expert in range(7)]
        tensors[f"{name}.down_proj"] = torch.stack(downs)

    rewrite_tensors(single, add)
    refused(single, f"{name}.0.down_proj.weight", "twice")


def test_more_experts_than_counted(single: Path) -> None:
    """Also where the router fits: what the configuration does not count would be lost without a word."""
    edit_config(single, n_routed_experts=6)
    rewrite_tensors(single, lambda ts: ts.update({n: t[:6].clone() for n, t in ts.items() if ".mlp.gate.w" in n}))
    refused(single, "model.layers.1.mlp.experts.6", "config.json")


@pytest.mark.parametrize("layout", ["per expert", "fused"])
def test_experts_in_a_dense_layer(tmp_path: Path, layout: str) -> None:
    config = odd_config("deepseek", torch.bfloat16)
    tensors = toy_tensors(config, torch.bfloat16)
    config["first_k_dense_replace"] = 1
    source = write_folder(tmp_path / "model", config, fused(config, tensors) if layout == "fused" else tensors)
    edit_config(source, first_k_dense_replace=2)
    refused(source, "model.layers.1.mlp.experts", "layer 1", "config.json")


def test_mixed_or_unfit_dtypes(single: Path) -> None:
    name = "model.layers.2.mlp.experts.4.gate_proj.weight"
    rewrite_tensors(single, lambda tensors: tensors.update({name: tensors[name].float()}))
    refused(single, "layer 2", "bfloat16", "float32")


def test_integer_experts(single: Path) -> None:
    def whole(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({n: t.to(torch.int8) for n, t in tensors.items() if "layers.2.mlp.experts." in n})

    rewrite_tensors(single, whole)
    refused(single, "layer 2", "int8")


# NaN and infinity


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.mlp.experts.6.down_proj.weight",
        "model.layers.1.mlp.experts.0.gate_proj.weight",
        "model.layers.2.mlp.gate.weight",
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.2.mlp.shared_experts.gate_proj.weight",
        "model.norm.weight",
    ],
)
def test_not_finite(single: Path, name: str, value: float) -> None:
    """Wherever it is, the last place of a tensor included, and whether the tensor is merged or carried over."""
    rewrite_tensors(single, lambda tensors: tensors[name].view(-1)[-1].fill_(value))
    refused(single, name, "model.safetensors", "NaN", recipes=tuple(RECIPES))


@pytest.mark.parametrize("method", ["ep-camex", "namex"])
def test_not_finite_where_nothing_is_solved(single: Path, method: str) -> None:
    """Weights that are uniform or reused do not let it pass."""
    name = "model.layers.3.mlp.experts.2.up_proj.weight"
    rewrite_tensors(single, lambda tensors: tensors[name].view(-1)[3].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        patch_checkpoint(single, single.parent / "out", Recipe(method=method))
    assert not (single.parent / "out").exists()


def test_not_finite_in_a_fused_tensor(tmp_path: Path) -> None:
    """Named by layer, expert and projection, though the file has one tensor for all."""
    source = odd_checkpoint(tmp_path / "model", "qwen2_moe", fuse=True, shards=1)
    fill = float("nan")
    rewrite_tensors(source, lambda ts: ts["model.layers.2.mlp.experts.gate_up_proj"][4, 9, 2].fill_(fill))
    refused(source, "model.layers.2.mlp.experts.4.up_proj", "NaN", recipes=tuple(RECIPES))


HEAD_LAYER = "model.layers.4.mlp.experts.0.gate_proj.weight"
"""Of a prediction head: the model has layers 0 to 3."""
EXTRA = ("model.buffer", "mtp.layers.0.mlp.experts.9.up_proj.weight", HEAD_LAYER, "model.layers.1.mlp.gate.bias")


@pytest.mark.parametrize("recipe", ["residual", "grouped", "smoe"])
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_that_the_class_lacks_are_left_out(tmp_path: Path, recipe: str, shards: int) -> None:
    """Prediction heads among them. All are named but the buffers that every class computes."""
    plain = odd_checkpoint(tmp_path / "plain", "deepseek", shards=shards)
    config = odd_config("deepseek", torch.bfloat16)
    more = {name: torch.full((2, 3), float("nan")) for name in EXTRA}
    more["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(4)
    source = write_folder(tmp_path / "model", config, toy_tensors(config, torch.bfloat16) | more, shards)
    expected = patch_checkpoint(plain, tmp_path / "expected", RECIPES[recipe])
    report = patch_checkpoint(source, tmp_path / "out", RECIPES[recipe])
    assert set(report.totals["left_out"]) == {*EXTRA, "model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert set(left_out_line(report.totals["left_out"]).split(": ")[1].split(", ")) == set(EXTRA)
    assert "left_out" not in expected.totals
    assert differing(read_tensors(tmp_path / "out"), read_tensors(tmp_path / "expected")) == []
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"].keys() == read_tensors(tmp_path / "expected").keys()
    sizes = [t.numel() * t.element_size() for t in read_tensors(tmp_path / "out").values()]
    assert index["metadata"]["total_size"] == sum(sizes)


def test_a_file_of_nothing_but_tensors_that_the_class_lacks(sharded: Path) -> None:
    """It is left out as a whole."""
    save_file({"mtp.norm.weight": torch.ones(3)}, sharded / "model-mtp.safetensors")
    edit_index(sharded, lambda names: names.update({"mtp.norm.weight": "model-mtp.safetensors"}))
    patch_checkpoint(sharded, sharded.parent / "out", RECIPES["smoe"])
    assert len(list((sharded.parent / "out").glob("*.safetensors"))) == 3
    assert "mtp.norm.weight" not in read_tensors(sharded.parent / "out")


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.3.post_attention_layernorm.weight",
        "model.layers.0.mlp.down_proj.weight",
    ],
)
def test_tensors_outside_the_mixtures(single: Path, name: str) -> None:
    """One that no file has would be random where the result is loaded."""
    rewrite_tensors(single, lambda tensors: tensors.update({name: tensors[name][..., :-1].clone()}))
    refused(single, name, "config.json")
    rewrite_tensors(single, lambda tensors: tensors.update({name: torch.ones(1, dtype=torch.int8)}))
    refused(single, name)
    rewrite_tensors(single, lambda tensors: tensors.pop(name))
    refused(single, name, "missing")


def test_a_bias_of_the_attention(tmp_path: Path) -> None:
    """Whether there is one the configuration says, for each family in its own way."""
    source = odd_checkpoint(tmp_path / "qwen", "qwen2_moe", shards=1)
    name = "model.layers.1.self_attn.k_proj.bias"
    rewrite_tensors(source, lambda tensors: tensors.pop(name))
    refused(source, name, "missing")
    source = odd_checkpoint(tmp_path / "deepseek", "deepseek", shards=1)
    edit_config(source, attention_bias=True)
    refused(source, "model.layers.0.self_attn.", "bias is missing")


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek"])
def test_a_tied_head_need_not_be_there(tmp_path: Path, family: str) -> None:
    source = odd_checkpoint(tmp_path / "model", family, tie_word_embeddings=True)
    assert "lm_head.weight" not in read_tensors(source)
    patch_checkpoint(source, tmp_path / "out")
    edit_config(source, tie_word_embeddings=False)
    refused(source, "lm_head.weight", "missing")


def test_a_quantised_tensor(single: Path) -> None:
    """Its scale lies beside it under a name that the class does not have."""
    name = "model.layers.1.self_attn.q_proj.weight"

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)})

    rewrite_tensors(single, quantise)
    refused(single, name, "float8_e4m3fn", "quantised")


@pytest.mark.parametrize("count", [-1, 0, 5000, 10**18, 2**78, True, 4.0, "4"])
@pytest.mark.parametrize("field", ["num_hidden_layers", "n_routed_experts", "hidden_size", "vocab_size"])
def test_counts_beyond_reason(single: Path, field: str, count: Any) -> None:
    """Answered before anything of that size is made."""
    edit_config(single, **{field: count})
    with pytest.raises((CheckpointError, FamilyError)) as caught:
        patch_checkpoint(single, single.parent / "out")
    assert field in str(caught.value) or "config.json" in str(caught.value)
    assert not (single.parent / "out").exists()


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek"])
@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": ["full_attention"] * 5},
        {"layer_types": ["full_attention"] * 3 + ["linear_attention"]},
        {"layer_types": "full_attention"},
        {"layer_types": [1, 2, 3, 4]},
        {"mlp_only_layers": [1, 99]},
        {"mlp_only_layers": [-1]},
        {"rope_parameters": {"rope_type": "no such"}},
        {"hidden_act": "no such"},
        {"num_attention_heads": "2"},
    ],
    ids=str,
)
def test_configurations_that_make_no_model(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    source = odd_checkpoint(tmp_path / "model", family, **changes)
    with pytest.raises((CheckpointError, FamilyError), match=r"config\.json") as caught:
        patch_checkpoint(source, tmp_path / "out")
    assert next(iter(changes)) in str(caught.value) or "no such" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["config.json", INDEX, "model-00001-of-00003.safetensors"])
def test_a_key_that_is_there_twice(sharded: Path, file: str) -> None:
    """Readers differ in which of the two values they take."""
    path = sharded / file
    data = path.read_bytes()
    if file.endswith(".json"):
        key = "weight_map" if file == INDEX else "vocab_size"
        path.write_bytes(data.replace(b"{", b'{"%s": 53, ' % key.encode(), 1))
    else:
        length = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + length].rstrip()
        key = next(name for name in json.loads(header) if name != "__metadata__")
        text = header[:-1] + b"," + json.dumps({key: json.loads(header)[key]}).encode()[1:]
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    refused(sharded, file, key, "twice", recipes=("residual",))


def test_an_adapter_beside_the_weights(sharded: Path) -> None:
    (sharded / "adapter_config.json").write_text("{}")
    refused(sharded, "adapter_config.json", "merge")
