"""A Hub that misbehaves: one line with what it said, status 2, and the same command goes on later."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from namex_hf import patch_checkpoint
from tests.helpers.commands import Answer, Command, child
from tests.helpers.hub import Fault, Hub

TOKEN = "hf_" + "secret0123456789abcdef"
HTML, JSON = {"Content-Type": "text/html; charset=utf-8"}, {"Content-Type": "application/json"}
PORTAL = Fault(200, b"<html><body>Welcome to our hotel</body></html>", HTML)
EVERY, API, WEIGHTS, FILES = "", "^GET /api/", "^GET .*/model.safetensors$", "/resolve/"
BATCH, COMMIT, CREATE, PUT = "/batch$", "/commit/", "/api/repos/create$", "^PUT "


def fails(where: str, fault: Fault, times: int = 10**9) -> Callable[[str, str], Fault | None]:
    """What makes requests fail whose method and path fit a pattern, so many times."""
    left = [fault] * min(times, 1000)

    def failure(method: str, path: str) -> Fault | None:
        return left.pop() if left and re.search(where, f"{method} {path}") else None

    return failure


def said(error: str) -> bytes:
    return json.dumps({"error": error}).encode()


def assert_line(answer: Answer, *says: str) -> None:
    assert answer.status == 2, answer
    assert answer.out == ""
    *shown, last = answer.err.splitlines()
    assert re.match("namex-[a-z]+: error: ", last), answer.err
    assert not any("Traceback" in line or "rror" in line for line in shown), answer.err
    for text in says:
        assert text in last
    assert "JSON" not in last
    assert TOKEN not in answer.err


FETCH = {
    "portal": (EVERY, PORTAL, "does not seem to be served by a Hugging Face Hub endpoint"),
    "portal-api": (API, PORTAL, "answered with a web page: a captive portal, a proxy, or a wrong HF_ENDPOINT?"),
    "redirect": ("^[A-Z]+ (?!/login)", Fault(302, b"", {"Location": "/login"}), "the Hub answered 404 EntryNotFound"),
    "redirect-nowhere": (API, Fault(302), "answered 302 with nothing, which no Hub does"),
    "redirect-circle": (EVERY, Fault(302, b"", {"Location": "/a"}), "Exceeded 20 redirects"),
    "later": (
        API,
        Fault(429, b"slow down", {"Retry-After": "3600"}),
        "the Hub answered 429 slow down; it asks to wait",
    ),
    "limit": (API, Fault(429, b"", {"RateLimit": '"api";r=0;t=300'}), "429 Too Many Requests; it asks to wait for 300"),
    "busy": (WEIGHTS, Fault(503, b"busy", {"Retry-After": "3600"}), "503 busy; it asks to wait for 3600 seconds"),
    "failing": (EVERY, Fault(501, said("maintenance"), {"X-Error-Message": "maintenance"}), "501 maintenance"),
    "conflict": (API, Fault(409, said("conflict here"), JSON), "the Hub answered 409 conflict here"),
    "list": (API, Fault(200, b"[1]", JSON), "answered 200 with '[1]', which no Hub does"),
    "half": (API, Fault(200, b'{"a":', JSON), "answered 200 with '{\"a\":', which no Hub does"),
    "blocked": (EVERY, Fault(451, b"", {"X-Error-Message": "blocked here"}), "the Hub answered 451 blocked here"),
    "unknown-token": (EVERY, Fault(401, b"", {"X-Error-Message": "Invalid user"}), "401 Invalid user"),
}


@pytest.mark.parametrize("case", FETCH)
def test_a_model_that_is_not_fetched(hub: Hub, online: Command, model: Path, tmp_path: Path, case: str) -> None:
    where, fault, says = FETCH[case]
    name = f"me/{case}"
    hub.add(name, model)
    patch = ("namex-patch", name, "--out", tmp_path / "out", "--quiet")
    hub.failure = fails(where, fault)
    assert_line(online(*patch), name, says)
    assert not (tmp_path / "out").exists()
    hub.failure = lambda method, path: None
    assert online(*patch) == (0, "", "")


def test_a_download_that_breaks_off(hub: Hub, online: Command, model: Path, tmp_path: Path) -> None:
    """Once: nobody notices. Every time: a line that says so, and the next run works."""
    for name, times in (("me/once", 1), ("me/always", 10**9)):
        hub.add(name, model)
        hub.failure = fails(WEIGHTS, Fault(cut=1000), times)
        answer = online("namex-patch", name, "--out", tmp_path / name[3:], "--quiet")
        if times == 1:
            assert answer == (0, "", "")
        else:
            assert_line(answer, "me/always cannot be fetched", "received 1000 bytes")
    hub.failure = lambda method, path: None
    assert online("namex-patch", "me/always", "--out", tmp_path / "always", "--quiet").status == 0
    for path in (tmp_path / "once").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "always" / path.name).read_bytes()


def test_who_may_not_read(hub: Hub, online: Command, model: Path) -> None:
    for name in ("me/gated", "me/hidden", "me/plain", "me/new"):
        hub.add(name, model)
    hub.gated.add("me/gated")
    hub.private.add("me/hidden")
    assert_line(
        online("namex-inspect", "me/gated"), "asks for your consent", "403 Access to model me/gated is restricted"
    )
    assert_line(online("namex-inspect", "me/hidden"), "me/hidden needs a token", "401 Invalid credentials")
    answer = online("namex-inspect", "me/plain", "--revision", "v3")
    assert_line(answer, "me/plain has no revision v3", "404 RevisionNotFound here")
    hub.renamed["me/old"] = "me/new"
    assert online("namex-inspect", "me/old").status == 0
    hub.private.discard("me/hidden")


@pytest.fixture(scope="session")
def patched(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy with a base expert, in two shards; not to be changed."""
    out = tmp_path_factory.mktemp("faults") / "out"
    patch_checkpoint(model, out, shard_size=20_000)
    return out


@pytest.fixture
def me(hub: Hub, online: Command) -> Iterator[Command]:
    """Commands of the user ``me``."""
    hub.users[TOKEN] = "me"
    assert online("token", TOKEN).status == 0
    yield online
    online("token")


FULL = "Private repository storage limit reached, please upgrade your plan to increase your private storage limit."
BUSY = "Cannot create repo: another conflicting operation is in progress"
"""After which the client asks again at once, for ever."""
OBJECTS = {"objects": [{"oid": "a" * 64, "size": 3, "error": {"code": 403, "message": "storage quota is full"}}]}
PUSH = {
    "full": (COMMIT, Fault(403, said(FULL), JSON), f"the Hub refused the push to me/push-full: 403 {FULL}"),
    "full-page": (
        COMMIT,
        Fault(403, b"<h1>Quota exceeded</h1>", HTML),
        "push to me/push-full-page: 403 Quota",
    ),
    "full-batch": (BATCH, Fault(403, b'{"message": "quota exceeded"}', JSON), "me/push-full-batch: 403 quota exceeded"),
    "full-object": (BATCH, Fault(200, json.dumps(OBJECTS).encode(), JSON), "storage quota is full"),
    "full-store": (PUT, Fault(403, b"<Error><Code>QuotaExceeded</Code></Error>"), "403 <Error><Code>QuotaExceeded"),
    "token": (
        COMMIT,
        Fault(403, said("no write permission"), JSON),
        "may not write to me/push-token (403 no write",
    ),
    "moved": (
        COMMIT,
        Fault(412, said("A commit has happened since."), JSON),
        "412 A commit has happened since.; the",
    ),
    "conflict": (
        COMMIT,
        Fault(409, said("Conflict"), JSON),
        "me/push-conflict: 409 Conflict; the same",
    ),
    "create": (
        CREATE,
        Fault(409, b"conflict elsewhere"),
        "me/push-create: 409 conflict elsewhere; the same",
    ),
    "create-loop": (
        CREATE,
        Fault(409, said(BUSY)),
        "409",
    ),
    "bill": (
        COMMIT,
        Fault(402, said("Payment required"), JSON),
        "refused the push to me/push-bill: 402 Payment",
    ),
    "portal": (EVERY, PORTAL, "answered with a web page: a captive portal, a proxy, or a wrong HF_ENDPOINT?"),
    "redirect": ("^[A-Z]+ (?!/login)", Fault(302, b"", {"Location": "/login"}), "404 EntryNotFound here"),
    "hang-up": (COMMIT, Fault(hang_up=True), "the Hub cannot be reached (RemoteProtocolError: Server disconnected"),
    "later": (
        COMMIT,
        Fault(429, b"", {"Retry-After": "900"}),
        "it asks to wait for 900 seconds",
    ),
}


@pytest.mark.parametrize("case", PUSH)
def test_a_push_that_fails(hub: Hub, me: Command, patched: Path, case: str) -> None:
    where, fault, says = PUSH[case]
    name = f"me/push-{case}"
    push = ("namex-push", patched, "--quiet", "--repo", name)
    hub.failure = fails(where, fault)
    assert_line(me(*push), says)
    hub.failure = lambda method, path: None
    answer = me(*push)
    assert answer == (0, f"{hub.url}/{name} (private, commit {hub.commit(name)})\n", "")


def test_a_server_that_hangs_up_once_is_not_noticed(hub: Hub, me: Command, patched: Path) -> None:
    hub.failure = fails(PUT, Fault(hang_up=True), 1)
    assert me("namex-push", patched, "--quiet", "--repo", "me/hung-up").status == 0
    assert me("same", "me/hung-up", patched).status == 0


def test_a_repository_with_another_name_now(hub: Hub, me: Command, patched: Path) -> None:
    hub.new("me/after")
    hub.private.add("me/after")
    hub.renamed["me/before"] = "me/after"
    assert me("namex-push", patched, "--quiet", "--repo", "me/before").status == 0
    assert "config.json" in hub.files("me/after")


def test_no_secret_is_echoed(hub: Hub, patched: Path, tmp_path: Path) -> None:
    """A password in HF_ENDPOINT; a token in the place of a repository, a model or an argument."""
    address = hub.url.replace("://", "://somebody:s3cret-word@")
    with child(tmp_path / "home", HF_ENDPOINT=address, HF_TOKEN=TOKEN) as run:
        answers = [
            run("namex-inspect", "me/none"),
            run("namex-inspect", TOKEN),
            run("namex-inspect", f"me/{TOKEN}"),
            run("namex-patch", TOKEN, "--out", tmp_path / "out"),
            run("namex-patch", "me/x", "--out", tmp_path / "out", f"--{TOKEN}"),
            run("namex-push", patched, "--repo", TOKEN),
            run("namex-push", patched, "--repo", f"me/{TOKEN}", "--dry-run"),
            run("namex-push", patched, "--repo", "me/x"),
            run("namex-push", patched, "--repo", "me/x", TOKEN),
        ]
        hub.failure = fails(EVERY, PORTAL)
        answers += [run("namex-inspect", "me/none"), run("namex-push", patched, "--repo", "me/x")]
        assert "http://***@127.0.0.1" in answers[-1].err
    assert [answer.status for answer in answers] == [2, 2, 2, 2, 2, 2, 0, 2, 2, 2, 2]
    for answer in answers:
        assert TOKEN not in answer.out + answer.err
        assert "s3cret-word" not in answer.out + answer.err


def as_0_1_0(folder: Path, where: Path) -> Path:
    """A patched folder in the places of that release."""
    shutil.copytree(folder, where)
    for now, before in (
        ("recipe.yaml", "namex_recipe.yaml"),
        ("report.json", "namex_report.json"),
        ("statistics.safetensors", "namex_statistics.safetensors"),
    ):
        (where / "namex" / now).rename(where / before)
    (where / "namex").rmdir()
    report = json.loads((where / "namex_report.json").read_text())
    del report["files"]  # as reports had none
    (where / "namex_report.json").write_text(json.dumps(report))
    (where / "namex_report").mkdir()
    (where / "namex_report/cosine.png").write_bytes(b"png")
    (where / "namex_scores.json").write_text("{}")
    (where / "arguments.py").unlink()  # its code had three classes, and forwards of other arguments
    (where / "soft.py").write_text("# of 0.1.0")
    config = json.loads((where / "config.json").read_text())
    del config["auto_map"]["AutoModelForSequenceClassification"]
    (where / "config.json").write_text(json.dumps(config))
    return where


def test_a_push_moves_what_0_1_0_wrote(hub: Hub, me: Command, patched: Path, tmp_path: Path) -> None:
    """Ours goes below namex/, from a folder of that release, and over a repository that it pushed."""
    old = as_0_1_0(patched, tmp_path / "old")
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    shutil.copytree(old, hub.new("me/moved"), dirs_exist_ok=True)
    hub.private.add("me/moved")
    (hub.folders["me/moved"] / "notes.md").write_text("mine")
    (hub.folders["me/moved"] / "weights-00001-of-00001.safetensors").write_bytes(b"left over")
    (hub.folders["me/moved"] / "additional_chat_templates").mkdir()
    (hub.folders["me/moved"] / "additional_chat_templates/old.jinja").write_text("left over")
    (hub.folders["me/moved"] / "adapter").mkdir()
    (hub.folders["me/moved"] / "adapter/adapter_model.safetensors").write_bytes(b"of an earlier push")
    answer = me("namex-push", old, "--repo", "me/moved", "--quiet")
    assert answer.status == 0, answer
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == before
    names = set(hub.files("me/moved"))
    plain = {path.relative_to(patched).as_posix() for path in patched.rglob("*") if path.is_file()}
    assert names == plain | {
        "namex/scores.json",
        "namex/pictures/cosine.png",
        "notes.md",
        "adapter/adapter_model.safetensors",
    }
    report = hub.files("me/moved")["namex/report.json"].read_bytes()
    assert report == (old / "namex_report.json").read_bytes()
    for name in ("config.json", "arguments.py", "soft.py"):
        assert hub.files("me/moved")[name].read_bytes() == (patched / name).read_bytes()
    assert me("same", "me/moved", patched).status == 0
