"""Models by Hub id: what is fetched, what is pinned, and what is said when it does not work."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from namex_hf import patch_checkpoint
from tests.helpers.checkpoints import change_config
from tests.helpers.commands import Answer, Command, child
from tests.helpers.hub import Hub
from tests.helpers.own_tokenizer import FILES, add_own_tokenizer

Publish = Callable[..., str]


@pytest.fixture
def publish(hub: Hub, model: Path, tmp_path: Path) -> Publish:
    """Put a copy of the toy on the Hub under a name, with changes to its configuration; returns its commit."""

    def add(name: str, **changes: object) -> str:
        folder = Path(shutil.copytree(model, tmp_path / "repositories" / name))
        change_config(folder, **changes)
        return hub.add(name, folder)

    return add


def assert_refused(answer: Answer, *says: str) -> None:
    assert answer.status == 2
    assert answer.out == ""
    assert answer.err.count("\n") == 1, answer.err
    assert answer.err.startswith(("namex-patch: error: ", "namex-inspect: error: "))
    for text in says:
        assert text in answer.err


def header_bytes(folder: Path) -> int:
    return 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")


def pad_weights(folder: Path) -> None:
    """Make the file longer than what one look at a header may fetch, by an embedding of more rows."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].repeat(80, 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, vocab_size=len(tensors["model.embed_tokens.weight"]))


def test_a_look_fetches_headers_only(hub: Hub, publish: Publish, online: Command, tmp_path: Path):
    commit = publish("me/look")
    pad_weights(hub.folders["me/look"])
    size = (hub.folders["me/look"] / "model.safetensors").stat().st_size
    look, dry = (
        online("namex-inspect", "me/look"),
        online("namex-patch", "me/look", "--out", tmp_path / "out", "--dry-run"),
    )
    assert (look.status, dry.status) == (0, 0), (look, dry)
    assert "qwen2_moe" in look.out
    assert commit in look.out
    assert "8 of width 8, top-3" in look.out
    assert "bytes in" in dry.out
    weights = [request for request in hub.log if request.file == "model.safetensors" and request.sent]
    assert 2 <= len(weights) <= 4
    assert all(request.sent <= 100_001 < size for request in weights)
    assert {request.file for request in hub.log if request.sent and request.file} == {
        "config.json",
        "model.safetensors",
    }
    assert not (tmp_path / "out").exists()


def test_a_patch_of_a_hub_id_is_that_of_the_folder(
    hub: Hub, publish: Publish, online: Command, model: Path, tmp_path: Path
):
    commit = publish("me/q")
    answer = online("namex-patch", "me/q", "--out", tmp_path / "out", "--quiet")
    assert answer == (0, "", "")
    report = json.loads((tmp_path / "out" / "namex/report.json").read_text())
    assert report["source"]["name"] == "me/q"
    assert report["source"]["commit"] == commit
    assert "base_model: me/q" in (tmp_path / "out" / "README.md").read_text()
    patch_checkpoint(model, tmp_path / "local")
    for name in ("config.json", "namex/recipe.yaml", "tokenizer.json", "namex/statistics.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    shards = sorted(path.name for path in (tmp_path / "local").glob("model*.safetensors"))
    assert shards == sorted(path.name for path in (tmp_path / "out").glob("model*.safetensors"))
    for name in shards:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    hub.log.clear()
    again = online("namex-patch", "me/q", "--out", tmp_path / "out")
    assert again.status == 0
    assert "is complete" in again.err
    assert hub.sent(".safetensors") == 0  # out of the cache


def test_a_commit_can_be_asked_for(hub: Hub, publish: Publish, online: Command, tmp_path: Path):
    commit = publish("me/pinned")
    answer = online("namex-patch", "me/pinned", "--revision", commit, "--out", tmp_path / "out", "--quiet")
    assert answer.status == 0, answer
    assert json.loads((tmp_path / "out" / "namex/report.json").read_text())["source"]["commit"] == commit
    wrong = online("namex-patch", "me/pinned", "--revision", "v9", "--out", tmp_path / "other")
    assert_refused(wrong, "me/pinned has no revision v9")
    assert not (tmp_path / "other").exists()


def test_an_unsupported_family_costs_a_configuration(hub: Hub, publish: Publish, online: Command, tmp_path: Path):
    publish("me/llama", model_type="llama")
    answer = online("namex-patch", "me/llama", "--out", tmp_path / "out")
    assert_refused(answer, "'llama' is not a supported family: this is a mixture of experts; accepted: deepseek")
    assert {request.file for request in hub.log} == {"config.json"}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command", [("namex-inspect",), ("namex-patch", "--out", "OUT"), ("namex-patch", "--dry-run", "--out", "OUT")]
)
def test_what_is_not_there(hub: Hub, publish: Publish, online: Command, tmp_path: Path, command: tuple[str, ...]):
    command = tuple(str(tmp_path / "out") if word == "OUT" else word for word in command)
    assert_refused(online(*command, "me/missing"), "me/missing is no model of the Hub")
    publish("me/pickles")
    (hub.folders["me/pickles"] / "model.safetensors").rename(hub.folders["me/pickles"] / "pytorch_model.bin")
    hub.log.clear()
    assert_refused(online(*command, "me/pickles"), "me/pickles", "pickle files are never opened")
    assert hub.sent(".bin") == 0
    publish("me/bare")
    (hub.folders["me/bare"] / "config.json").unlink()
    assert_refused(online(*command, "me/bare"), "me/bare has no config.json")
    assert not (tmp_path / "out").exists()


def test_shards_that_are_no_safetensors(hub: Hub, publish: Publish, online: Command, tmp_path: Path):
    publish("me/noise")
    (hub.folders["me/noise"] / "model.safetensors").write_bytes(b"\xff" * 4000)
    assert_refused(online("namex-inspect", "me/noise"), "me/noise")
    publish("me/exotic")
    header = json.dumps({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    data = len(header).to_bytes(8, "little") + header + b"\0"
    (hub.folders["me/exotic"] / "model.safetensors").write_bytes(data)
    assert_refused(online("namex-inspect", "me/exotic"), "me/exotic", "F4")


def test_an_index_and_its_shards(hub: Hub, publish: Publish, online: Command, tmp_path: Path):
    publish("me/shards")
    folder = hub.folders["me/shards"]
    tensors, weight_map = load_file(folder / "model.safetensors"), {}
    for number in (1, 2):
        part = {name: tensor for i, (name, tensor) in enumerate(sorted(tensors.items())) if i % 2 == number - 1}
        file = f"model-0000{number}-of-00002.safetensors"
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    look = online("namex-inspect", "me/shards")
    assert look.status == 0, look
    assert online("namex-patch", "me/shards", "--out", tmp_path / "out", "--quiet").status == 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == 3


@pytest.mark.parametrize("name", ["weights-0000{}-of-00002.safetensors", "mtp[{}].safetensors"])
def test_files_that_the_index_names_otherwise(
    hub: Hub, publish: Publish, online: Command, tmp_path: Path, name: str
) -> None:
    """Fetched whatever their names; what lies beside them is not."""
    repository = f"me/other-{name[:3]}"
    publish(repository)
    folder = hub.folders[repository]
    tensors = load_file(folder / "model.safetensors")
    index = {tensor: name.format(1 + number % 2) for number, tensor in enumerate(sorted(tensors))}
    for file in set(index.values()):
        save_file({one: tensors[one] for one in tensors if index[one] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    dry = online("namex-patch", repository, "--out", tmp_path / "out", "--dry-run")
    assert dry.status == 0, dry
    answer = online("namex-patch", repository, "--out", tmp_path / "out", "--quiet")
    assert answer == (0, "", "")
    assert hub.sent("other.safetensors") == 0
    patch_checkpoint(folder, tmp_path / "local")
    for file in (tmp_path / "local").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    (folder / name.format(2)).unlink()
    hub.pushes[repository] = 1  # another commit
    for flags in (("--dry-run",), ("--quiet",)):
        missing = online("namex-patch", repository, "--out", tmp_path / "missing", *flags)
        assert_refused(missing, f"names {name.format(2)}, which the repository does not have")


def test_what_is_carried_is_said_and_fetched(hub: Hub, publish: Publish, online: Command, tmp_path: Path) -> None:
    publish("me/more")
    folder = hub.folders["me/more"]
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("{{ 'T' }}")
    (folder / "License.txt").write_text("MIT License")
    for name in ("tokenizer.pkl", "LICENSE.sh", "license-list/a.txt", "tokenizer.json.exe"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    dry = online("namex-patch", "me/more", "--out", tmp_path / "out", "--dry-run")
    said = dry.out.split("files carried over")[1]
    for name in ("License.txt", "tool_use.jinja", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert name in said
    assert "none" not in said
    assert online("namex-patch", "me/more", "--out", tmp_path / "out", "--quiet").status == 0
    assert (tmp_path / "out/additional_chat_templates/tool_use.jinja").read_text() == "{{ 'T' }}"
    assert (tmp_path / "out/License.txt").read_text() == "MIT License"
    left = ("tokenizer.pkl", "LICENSE.sh", "license-list/a.txt", "tokenizer.json.exe")
    assert not [name for name in left if (tmp_path / "out" / name).exists() or hub.sent(name)]
    (folder / "adapter_config.json").write_text("{}")
    hub.pushes["me/more"] = 1  # another commit
    for flags in (("--dry-run",), ("--quiet",)):
        answer = online("namex-patch", "me/more", "--out", tmp_path / "adapted", *flags)
        assert_refused(answer, "me/more has an adapter beside its weights")


def test_the_code_of_a_tokenizer_is_fetched(hub: Hub, publish: Publish, online: Command, tmp_path: Path, home: Path):
    """Its own and what that imports, no other code; from the cache alone, too."""
    publish("me/own")
    folder = add_own_tokenizer(hub.folders["me/own"])
    (folder / "tokenizer.json").unlink()
    (folder / "tokenization_other.py").write_text("raise SystemExit")
    answer = online("namex-patch", "me/own", "--out", tmp_path / "out")
    assert answer.status == 0, answer
    assert (
        "the tokenizer's code is carried over as it is, and was not run: tokenization_own.py, pieces_own.py"
        in answer.err
    )
    assert "no tokenizer that opens without code of its own in the checkpoint: perplexity is skipped" in answer.err
    assert hub.sent("tokenization_other.py") == 0
    with child(home, HF_HUB_OFFLINE="1", HF_ENDPOINT=hub.url) as run:
        assert run("namex-patch", "me/own", "--out", tmp_path / "offline", "--quiet").status == 0
    for out in (tmp_path / "out", tmp_path / "offline"):
        for name in (*FILES, "tokenizer_config.json"):
            assert (out / name).read_bytes() == (folder / name).read_bytes()
        assert not (out / "tokenization_other.py").exists()


def test_what_is_scored_is_fetched_alike(hub: Hub, publish: Publish, online: Command, model: Path, tmp_path: Path):
    """`eval/zero_shot.py` takes any family, patched or not, with the report of a patched one."""
    patch_checkpoint(model, tmp_path / "out")
    (tmp_path / "out" / "training_args.bin").write_bytes(b"a pickle")
    hub.add("me/scored", tmp_path / "out")
    files = online("scored", "me/scored").out.split()
    assert {"config.json", "namex/report.json", "tokenizer.json", "model.safetensors.index.json"} <= set(files)
    assert not {"training_args.bin", "namex/statistics.safetensors"} & set(files)
    answer = online("scored", "me/none")
    assert answer.status == 2
    assert "me/none is no model of the Hub" in answer.err


def test_without_a_network(tmp_path: Path, hub: Hub, publish: Publish, online: Command, home: Path):
    """What is in the cache is patched all the same; what is not is answered in a line."""
    publish("me/cached")
    publish("me/empty")
    assert online("namex-inspect", "me/empty").status == 0  # which leaves the configuration alone in the cache
    assert online("namex-patch", "me/cached", "--out", tmp_path / "first", "--quiet").status == 0
    with child(home, HF_ENDPOINT="http://127.0.0.1:9") as run:
        run("namex-inspect", "nothing")  # by now it has imported what it needs
        for command in (("namex-inspect",), ("namex-patch", "--out", tmp_path / "out")):
            start = time.monotonic()
            assert_refused(run(*command, "me/other"), "me/other", "no network?")
            assert time.monotonic() - start < 5, "it tried again and again"
        assert run("namex-inspect", "me/cached").status == 0
        assert run("namex-patch", "me/cached", "--out", tmp_path / "unreachable", "--quiet") == (0, "", "")
    hub.log.clear()
    with child(home, HF_HUB_OFFLINE="1", HF_ENDPOINT=hub.url) as run:
        for command in (("namex-inspect",), ("namex-patch", "--out", tmp_path / "out", "--dry-run")):
            assert_refused(run(*command, "me/other"), "me/other", "no network?")
            assert run(*command, "me/cached").status == 0
            empty = run(*command, "me/empty")
            assert_refused(empty, "me/empty: its weights are not in the local cache", "no network?")
            assert "pickle" not in empty.err
        assert run("namex-patch", "me/cached", "--out", tmp_path / "second", "--quiet").status == 0
    assert hub.log == []
    assert not (tmp_path / "out").exists()
    reports = [
        json.loads((tmp_path / name / "namex/report.json").read_text()) for name in ("first", "unreachable", "second")
    ]
    assert reports[0]["source"] == reports[1]["source"] == reports[2]["source"]
