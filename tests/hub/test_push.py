"""`namex-push` against a Hub of the loopback interface, by the real client."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from namex_hf import patch_checkpoint
from namex_hf.checkpoint.folder import check_whole
from namex_hf.files import INDEX
from namex_hf.models import load_patched
from tests.helpers.checkpoints import all_files
from tests.helpers.commands import TOKEN, WRONG, Command, assert_refused
from tests.helpers.hub import Hub
from tests.helpers.own_tokenizer import FILES, add_own_tokenizer


@pytest.fixture(scope="session")
def patched(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy with a base expert, in two shards; not to be changed."""
    out = tmp_path_factory.mktemp("patched") / "out"
    patch_checkpoint(model, out, shard_size=20_000)
    return out


@pytest.fixture
def folder(patched: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(patched, tmp_path / "folder"))


@pytest.fixture
def me(hub: Hub, online: Command) -> Iterator[Command]:
    """Commands of the user ``me``."""
    hub.users[TOKEN] = "me"
    assert online("token", TOKEN).status == 0
    yield online
    online("token")


def pushed(hub: Hub, name: str) -> set[str]:
    return set(hub.files(name))


def test_what_is_pushed_is_what_was_there(hub: Hub, me: Command, folder: Path):
    for name in ("checkpoint-3/model.safetensors", "checkpoint-3/optimizer.pt", "adapter/adapter_model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"of a run")
    for name in ("training_args.bin", "run.log", ".env", "evil.py", "notes.txt"):
        (folder / name).write_text(f"token={TOKEN}")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    answer = me("namex-push", folder, "--repo", "me/first")
    assert answer.status == 0, answer
    assert answer.out == f"{hub.url}/me/first (private, commit {hub.commit('me/first')})\n"
    assert "me/first" in hub.private
    mine = set(all_files(folder))
    stay = {"training_args.bin", "run.log", ".env", "evil.py", "notes.txt"}
    assert pushed(hub, "me/first") == {
        name for name in mine - stay if not name.startswith(("checkpoint-3/", "adapter/"))
    }
    for name, path in hub.files("me/first").items():
        assert name == "README.md" or path.read_bytes() == (folder / name).read_bytes()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    for stays in ("checkpoint-3/", "adapter/", "training_args.bin", "evil.py", ".env"):
        assert f"stays: {stays}" in answer.err
    text = (hub.folders["me/first"] / "README.md").read_text()
    assert 'from_pretrained("me/first", trust_remote_code=True)' in text
    assert "PATH_OR_ID" not in text
    assert me("same", "me/first", folder).status == 0
    assert TOKEN not in answer.out + answer.err
    assert all(TOKEN.encode() not in path.read_bytes() for path in hub.files("me/first").values())
    hub.log.clear()
    again = me("namex-push", folder, "--repo", "me/first", "--quiet")
    assert again == (0, answer.out, ""), "an equal push makes no commit"
    assert not any("objects" in path and "batch" not in path for path in hub.writes())


def test_a_dry_run_asks_nobody(hub: Hub, online: Command, folder: Path):
    answer = online("namex-push", folder, "--repo", "me/dry", "--dry-run")
    assert answer.status == 0, answer
    assert answer.err == ""
    for path in folder.glob("*.safetensors"):
        assert f"{path.stat().st_size:,}" in answer.out
    assert "it runs" in answer.out
    assert hub.log == []


def test_a_push_that_was_broken_off_goes_on(hub: Hub, me: Command, folder: Path):
    """The third file fails; the first two are not sent again, and nothing is to be seen before all are there."""
    kept: list[str] = []

    def third(method: str, path: str) -> int | None:
        if method == "PUT" and path not in kept:
            if len(kept) == 2:
                return 501  # which the client takes for an answer; it tries again after 500
            kept.append(path)
        return None

    hub.failure = third
    assert_refused(me("namex-push", folder, "--repo", "me/broken"), "the Hub failed with 501", "goes on from there")
    assert pushed(hub, "me/broken") == set()
    hub.failure = lambda method, path: None
    hub.log.clear()
    answer = me("namex-push", folder, "--repo", "me/broken")
    assert answer.status == 0, answer
    assert len(kept) == 2
    assert not set(kept).intersection(hub.writes())
    assert [path for path in hub.writes() if path.startswith("/objects/")]
    assert me("same", "me/broken", folder).status == 0


def test_a_server_that_recovers_is_not_noticed(hub: Hub, me: Command, folder: Path):
    failed: list[str] = []

    def once(method: str, path: str) -> int | None:
        if method == "PUT" and not failed:
            failed.append(path)
            return 503
        return None

    hub.failure = once
    answer = me("namex-push", folder, "--repo", "me/flaky", "--quiet")
    assert (answer.status, answer.err, len(failed)) == (0, "", 1), answer


def test_who_may_not(hub: Hub, me: Command, folder: Path):
    push = ("namex-push", folder, "--quiet", "--repo")
    assert_refused(me(*push, "you/theirs"), "the token may not write to you/theirs", "HF_TOKEN")
    assert_refused(me(*push, "me/none", "--pull-request"), "me/none does not exist")
    me("token", WRONG)
    assert_refused(me(*push, "me/wrong"), "the Hub refuses the token")
    me("token")
    hub.log.clear()
    assert_refused(me(*push, "me/nobody"), "no token for me/nobody", "hf auth login")
    assert hub.log == []
    assert not {"me/none", "me/wrong", "me/nobody", "you/theirs"}.intersection(hub.folders)


def test_no_hub(hub: Hub, me: Command, folder: Path):
    hub.failure = lambda method, path: 418 if path == "/api/repos/create" else None
    assert_refused(me("namex-push", folder, "--quiet", "--repo", "me/tea"), "the Hub refused the push to me/tea: 418")


def test_others_models_and_public_repositories_are_left_alone(hub: Hub, me: Command, model: Path, folder: Path):
    hub.add("me/other", model)
    hub.private.add("me/other")
    before = pushed(hub, "me/other")
    assert_refused(me("namex-push", folder, "--quiet", "--repo", "me/other"), "a model that namex_hf did not write")
    hub.new("me/shown")
    push = ("namex-push", folder, "--quiet", "--repo", "me/shown")
    assert_refused(me(*push), "me/shown is public; say --public")
    assert (pushed(hub, "me/other"), pushed(hub, "me/shown")) == (before, set())
    answer = me(*push, "--public")
    assert answer == (0, f"{hub.url}/me/shown (public, commit {hub.commit('me/shown')})\n", "")


def test_a_later_push_takes_old_weights_away(hub: Hub, me: Command, folder: Path):
    """Else transformers would load what is left over before the index."""
    assert me("namex-push", folder, "--quiet", "--repo", "me/twice", "--public").status == 0
    (hub.folders["me/twice"] / "model.safetensors").write_bytes(b"old")
    (hub.folders["me/twice"] / "soft_old.py").write_text("old")
    (hub.folders["me/twice"] / "notes.md").write_text("mine")
    assert me("namex-push", folder, "--quiet", "--repo", "me/twice", "--public").status == 0
    assert pushed(hub, "me/twice") == set(all_files(folder)) | {"notes.md"}


def test_branches_and_pull_requests(hub: Hub, me: Command, folder: Path):
    push = ("namex-push", folder, "--quiet", "--repo")
    answer = me(*push, "me/many", "--revision", "half")
    assert answer.out.startswith(f"{hub.url}/me/many/tree/half (private"), answer
    assert pushed(hub, "me/many") == set()
    assert "config.json" in pushed(hub, "me/many@half")
    assert me("same", "me/many", folder, "half").status == 0
    assert_refused(me(*push, "me/many", "--revision", "refs/pr/7"), "me/many has no such branch")
    hub.new("you/theirs")
    proposed = me(*push, "you/theirs", "--pull-request", "--public")
    assert proposed.out.startswith(f"{hub.url}/you/theirs/discussions/1 (public"), proposed
    assert pushed(hub, "you/theirs") == set()
    assert "config.json" in pushed(hub, "you/theirs@refs/pr/1")
    both = me(*push, "you/theirs", "--pull-request", "--revision", "x")
    assert_refused(both, "does not go with --revision")
    hub.folders.pop("you/theirs")


def test_the_licence_is_that_of_the_base_model(hub: Hub, me: Command, model: Path, folder: Path, tmp_path: Path):
    base = Path(shutil.copytree(model, tmp_path / "base"))
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: tongyi\ntags: [moe, 'x: y']\nlanguage: en\n---\n# B\n"
    )
    commit = hub.add("you/base", base)
    card = (folder / "README.md").read_text()
    stated = f"---\nbase_model: you/base\nbase_model_commit: {commit}\n"
    (folder / "README.md").write_text(card.replace("---\n", stated, 1))
    assert me("namex-push", folder, "--quiet", "--repo", "me/licensed").status == 0
    data = ModelCard.load(hub.folders["me/licensed"] / "README.md").data
    assert (data.license, data.license_name, data.base_model) == ("other", "tongyi", "you/base")
    assert (data.language, data.tags) == (["en"], ["namex", "moe", "merge", "qwen2_moe", "x: y"])
    gone = "---\nbase_model: you/gone\n"
    (folder / "README.md").write_text(card.replace("---\n", gone, 1))
    assert me("namex-push", folder, "--quiet", "--repo", "me/unlicensed").status == 0
    assert ModelCard.load(hub.folders["me/unlicensed"] / "README.md").data.license is None


def test_a_token_in_a_file_stays_here(hub: Hub, me: Command, folder: Path):
    (folder / "tokenizer_config.json").write_text(json.dumps({"auth": TOKEN}))
    (folder / "tokenizer.json").unlink()
    report = json.loads((folder / "namex/report.json").read_text())
    del report["files"]  # else the missing file is noticed first
    (folder / "namex/report.json").write_text(json.dumps(report))
    answer = me("namex-push", folder, "--quiet", "--repo", "me/leak")
    assert_refused(answer, "tokenizer_config.json holds the token")
    assert hub.log == []


def test_namex_patch_pushes_what_it_has_made(hub: Hub, me: Command, model: Path, tmp_path: Path):
    out = tmp_path / "out"
    patch = ("namex-patch", model, "--out", out, "--quiet", "--push-to-hub")
    assert_refused(me("namex-patch", model, "--out", out, "--public"), "--push-to-hub REPO", "missing")
    assert_refused(me(*patch, "no slash"), "'no slash' is no repository; accepted: USER/NAME")
    me("token", WRONG)
    assert_refused(me(*patch, "me/made"), "the Hub refuses the token")
    assert not out.exists(), "a token that is refused is told before anything is read"
    me("token", TOKEN)
    dry = me("namex-patch", model, "--out", out, "--dry-run", "--push-to-hub", "me/made")
    assert (dry.status, "me/made" in hub.folders) == (0, False)
    answer = me(*patch, "me/made")
    assert answer.out == f"{hub.url}/me/made (private, commit {hub.commit('me/made')})\n", answer
    assert me("same", "me/made", out).status == 0
    again = me(*patch, "me/made", "--public")
    assert again == (0, answer.out, ""), "a private repository stays private"


def test_the_code_of_a_tokenizer_stays(hub: Hub, me: Command, model: Path, tmp_path: Path):
    """And so does the pointer to it; what went up is whole."""
    source, out = add_own_tokenizer(Path(shutil.copytree(model, tmp_path / "source"))), tmp_path / "out"
    patch_checkpoint(source, out)
    before = all_files(out)
    answer = me("namex-push", out, "--repo", "me/own")
    assert answer.status == 0, answer
    assert "note: the tokenizer's code stays here (tokenization_own.py, pieces_own.py): users need the" in answer.err
    for name in FILES:
        assert f"stays: {name}: code that is not of this model's class" in answer.err
    assert set(hub.files("me/own")) == set(before) - set(FILES)
    there = hub.folders["me/own"]
    assert json.loads((there / "tokenizer_config.json").read_text()) == {"tokenizer_class": "OwnTokenizer"}
    check_whole(there, verify=True)
    assert all_files(out) == before


def test_tensors_that_the_class_lacks_stay(hub: Hub, me: Command, folder: Path):
    """Releases before 0.2.0 carried them over: the shard, the index and the report go up anew, the folder stays."""
    shard = min(folder.glob("model*.safetensors"))
    tensors = load_file(shard)
    extra = {"mtp.norm.weight": torch.ones(3), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors | extra, shard, {"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(extra, shard.name)
    (folder / INDEX).write_text(json.dumps(index))
    report = json.loads((folder / "namex/report.json").read_text())
    report["files"][shard.name] = {"bytes": shard.stat().st_size}
    (folder / "namex/report.json").write_text(json.dumps(report))
    before = all_files(folder)
    answer = me("namex-push", folder, "--repo", "me/q")
    assert answer.status == 0, answer
    assert "left out, since the model's class does not have them: mtp.norm.weight" in answer.err
    assert all_files(folder) == before
    there = hub.folders["me/q"]
    assert load_file(there / shard.name).keys() == tensors.keys()
    assert all(torch.equal(found, tensors[name]) for name, found in load_file(there / shard.name).items())
    assert not extra.keys() & json.loads((there / INDEX).read_text())["weight_map"].keys()
    check_whole(there, verify=True)
    load_patched(there)
