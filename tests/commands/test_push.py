"""What `namex-push` says before it asks any network: bad folders, cards and arguments, and what goes up."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from namex_hf import patch_checkpoint
from namex_hf.commands import push
from namex_hf.errors import PublishError
from namex_hf.hub import checks, client
from namex_hf.recipe import Recipe
from tests.helpers.checkpoints import change_config
from tests.helpers.toy_models import save_toy

Refused = Callable[..., str]


@pytest.fixture(scope="session")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy with a base expert; not to be changed."""
    root = tmp_path_factory.mktemp("patched")
    patch_checkpoint(save_toy(root / "toy", tokenizer=True), root / "out", Recipe())
    return root / "out"


@pytest.fixture(scope="session")
def stock(patched: Path) -> Path:
    """What it was made of."""
    return patched.parent / "toy"


@pytest.fixture
def folder(patched: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(patched, tmp_path / "folder"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run namex-push on bad input and return its complaint, after checking what holds for every one."""

    def run(folder: Path, *flags: object, repo: str = "me/q") -> str:
        try:
            status = push.main([str(folder), "--repo", repo, "--dry-run", *map(str, flags)])
        except SystemExit as ended:  # argparse's own complaints
            status = ended.code
        said = capsys.readouterr()
        assert status == 2
        assert said.out == ""
        assert said.err.startswith("namex-push: error: ")
        assert said.err.count("\n") == 1, said.err
        return said.err

    return run


def shown(capsys: pytest.CaptureFixture[str], folder: Path, *flags: str) -> str:
    assert push.main([str(folder), "--repo", "me/q", "--dry-run", *flags]) == 0
    return capsys.readouterr().out


def weights(folder: Path) -> Path:
    return max(folder.glob("model*.safetensors"), key=lambda path: path.stat().st_size)


def unlisted(folder: Path) -> None:
    """Take the list of files out of the report, as reports before 0.2.0 had none: what is looked at later is tested."""
    values = json.loads((folder / "namex/report.json").read_text())
    del values["files"]
    (folder / "namex/report.json").write_text(json.dumps(values))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(weights(folder))
    change(tensors)
    save_file(tensors, weights(folder), {"format": "pt"})


def test_folders_that_are_none_of_ours(
    refused: Refused, folder: Path, stock: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert "no folder; needed: one that namex-patch" in refused(tmp_path / "none")
    assert "config.json has no recipe under 'namex'" in refused(stock)
    assert "config.json cannot be read" in refused(tmp_path)
    (folder / "namex/report.json").write_text("[")
    assert "report.json is no JSON" in refused(folder)
    (folder / "namex/report.json").write_text('{"a": 1}')
    assert "report.json is no report of namex_hf (" in refused(folder)
    (folder / "namex/report.json").unlink()
    assert "namex/report.json was missing and is rebuilt" in " ".join(shown(capsys, folder).split())
    assert json.loads((folder / "namex/report.json").read_text())["run"]["rebuilt"]
    (folder / ".namex").mkdir()
    assert "is unfinished (.namex is there)" in refused(folder)


def test_folders_that_do_not_load(
    refused: Refused, folder: Path, patched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def fresh() -> None:
        shutil.rmtree(folder)
        shutil.copytree(patched, folder)
        unlisted(folder)

    unlisted(folder)
    weights(folder).write_bytes(weights(folder).read_bytes()[:-100])
    assert weights(folder).name in refused(folder)
    fresh()
    change_tensors(folder, lambda all_: all_.update({"model.norm.weight": all_["model.norm.weight"] * float("nan")}))
    assert "gives NaN or infinity on its first 8 tokens" in refused(folder)
    fresh()
    index = folder / "model.safetensors.index.json"
    change_tensors(folder, lambda all_: all_.pop("model.norm.weight"))
    values = json.loads(index.read_text())
    values["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(values))
    assert "tensors are in no file, the first is model.norm.weight" in refused(folder)
    fresh()
    change_config(folder, hidden_size=24)
    assert "does not load (" in refused(folder)


def test_code_that_is_missing_or_of_others(refused: Refused, folder: Path):
    unlisted(folder)
    (folder / "soft_cache.py").unlink()
    assert "lacks soft_cache.py" in refused(folder)
    change_config(folder, auto_map={"AutoConfig": "evil--code.Config"})
    assert "auto_map is {'AutoConfig': 'evil--code.Config'}" in refused(folder)
    change_config(folder, auto_map=None)
    assert "auto_map is {}; accepted for this model_type: {'AutoConfig'" in refused(folder)


def test_tokenizers(refused: Refused, folder: Path, capsys: pytest.CaptureFixture[str]):
    unlisted(folder)
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"]["vocab"]["new"] = 300
    file.write_text(json.dumps(values))
    assert "its tokenizer has token 300; the model has rows for 260" in refused(folder)
    file.write_text("{}")
    assert "its tokenizer does not load (" in refused(folder)
    file.unlink()
    assert "note: no tokenizer" in shown(capsys, folder)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"# A\n", "no metadata block"),
        (b"---\n[\n---\n", "no metadata block"),
        (b"\xff", "is not UTF-8 text"),
        (b"---\ntags: moe\n---\n", "metadata field 'tags' is str; accepted: list"),
        (b"---\nlicense: 2\n---\n", "metadata field 'license' is int; accepted: str"),
        (b"---\ntags: [a]\nmodel-index: [{name: a, results: [{task: 1}]}]\n---\n", "metadata that the Hub cannot read"),
        (None, "README.md cannot be read"),
    ],
)
def test_cards_that_the_hub_would_refuse(refused: Refused, folder: Path, text: bytes | None, says: str):
    (folder / "README.md").unlink()
    if text is not None:
        (folder / "README.md").write_bytes(text)
    assert says in refused(folder)


def test_arguments(refused: Refused, folder: Path, tmp_path: Path):
    for repo in ("q", "me/q/r", "me/", "../x"):
        assert "is no repository; accepted: USER/NAME" in refused(folder, repo=repo)
    assert "--eval-label names a row of --eval FILE" in refused(folder, "--eval-label", "tiny")
    for include in ("adapter", "notes", "../folder", "checkpoint-3"):
        assert f"--include {include}: accepted: adapter, compare or checkpoint-N" in refused(
            folder, "--include", include
        )
    assert "does not go with --revision" in refused(folder, "--pull-request", "--revision", "x")
    assert "none.json cannot be read" in refused(folder, "--eval", tmp_path / "none.json")


def test_a_file_larger_than_the_hub_takes(refused: Refused, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "LARGEST_FILE", weights(folder).stat().st_size - 1)
    assert f"{weights(folder).name} is larger than 50 GB" in refused(folder)


def test_a_large_model_is_matched_without_its_weights(
    refused: Refused, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(checks, "RUN_BYTES", 1)
    assert "every tensor's name and shape fits its class" in shown(capsys, folder)
    change_config(folder, hidden_size=24)
    assert "does not load (" in refused(folder)


def test_links_that_leave_the_folder(
    refused: Refused, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "a.png").write_text("mine")
    (folder / "namex/pictures").symlink_to(tmp_path / "secret")
    (folder / "more.png").symlink_to(tmp_path / "secret" / "a.png")
    text = shown(capsys, folder)
    assert "stays: namex/pictures: a link that leaves the folder" in text
    assert "stays: more.png: a link that leaves the folder" in text
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    assert "tokenizer.json is a link that leaves the folder; needed: the file itself" in refused(folder)


def test_what_goes_up_of_a_fine_tuned_folder(folder: Path, capsys: pytest.CaptureFixture[str]):
    """Checkpoints, rivals and adapters stay unless asked for, and then without optimiser, logs and pickles."""
    for name in (
        "adapter/adapter_model.safetensors",
        "adapter/training_args.bin",
        "compare/namex/model.safetensors",
        "compare/namex/checkpoint-1/model.safetensors",
        "compare/namex/.namex/run.json",
        "checkpoint-10/model.safetensors",
        "checkpoint-10/optimizer.safetensors",
        "checkpoint-10/trainer_state.json",
        "checkpoint-10/optimizer.pt",
        "runs/events.out.tfevents.1",
        "namex/pictures/cosine.png",
        "namex/scores.json",
        "LICENSE",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    text = shown(capsys, folder)
    up = {line.split()[1] for line in text.splitlines() if line.startswith("│")}
    assert {"namex/pictures/cosine.png", "namex/scores.json", "LICENSE", "config.json"} <= up
    assert not any(name.startswith(("adapter", "compare", "checkpoint", "runs")) for name in up)
    assert "stays: checkpoint-10/ (4 files): goes up with --include checkpoint-10" in text
    assert "stays: runs/events.out.tfevents.1: not of the model" in text
    include = [word for name in ("adapter", "compare", "checkpoint-10") for word in ("--include", name)]
    text = shown(capsys, folder, *include)
    more = {line.split()[1] for line in text.splitlines() if line.startswith("│")} - up
    assert {name for name in more if "/" in name} == {
        "adapter/adapter_model.safetensors",
        "compare/namex/model.safetensors",
        "checkpoint-10/model.safetensors",
    }
    assert "stays: adapter/training_args.bin: a pickle" in text
    assert "stays: compare/ (2 files): of a run" in text


def test_what_goes_wrong_with_the_client_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", token := "hf_" + "b" * 20)
    says = r"^the Hub cannot be reached \(.* Connection refused\); no network\? The same command goes on$"
    with pytest.raises(PublishError, match=says), client.client("me/q"):
        HfApi(endpoint="http://127.0.0.1:9", token=token).whoami()
    says = r"^me/q cannot be pushed to \(ValueError: \*\*\* is odd\)$"
    with pytest.raises(PublishError, match=says) as caught, client.client("me/q"):
        raise ValueError(f"{token}\nis odd")
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__, "a traceback would show the token"
