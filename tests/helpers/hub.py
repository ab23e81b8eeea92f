"""A Hub on the loopback interface: the endpoints that huggingface_hub reads and pushes by, and a log of requests."""

import base64
import hashlib
import json
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

INFO = re.compile(r"/api/(?:models|datasets)/([^/]+/[^/]+?)(?:/revision/([^/]+))?")
TREE = re.compile(r"/api/(?:models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/data)?")
FILE = re.compile(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
WRITE = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/([^/]+)")
BATCH = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")
OBJECT = re.compile(r"/objects/([0-9a-f]{64})")


@dataclass(frozen=True)
class Request:
    """One request, and how many bytes of the file it was answered with."""

    method: str
    path: str
    sent: int = 0

    @property
    def file(self) -> str | None:
        match = FILE.fullmatch(self.path)
        return match[3] if match else None


@dataclass(frozen=True)
class Fault:
    """An answer in the place of the right one."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    hang_up: bool = False
    """No answer at all: the connection ends while the request is still read."""
    cut: int | None = None
    """The right answer, of which so many bytes are sent before the connection ends."""


@dataclass
class Hub:
    """Repositories by id, each a local folder with one commit a branch; a branch has its name behind an ``@``."""

    folders: dict[str, Path] = field(default_factory=dict)
    log: list[Request] = field(default_factory=list)
    url: str = ""
    root: Path | None = None
    """Where repositories are made that are pushed."""
    users: dict[str, str] = field(default_factory=dict)
    """By token."""
    private: set[str] = field(default_factory=set)
    pushes: dict[str, int] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """What was put into large-file storage, by SHA-256."""
    failure: Callable[[str, str], int | Fault | None] = lambda method, path: None
    """What a request is to fail with: a status, or another answer."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Repositories that have another name now, to which the Hub redirects."""
    gated: set[str] = field(default_factory=set)

    def add(self, name: str, folder: Path) -> str:
        """Publish a folder; returns its commit."""
        self.folders[name] = folder
        return self.commit(name)

    def commit(self, name: str) -> str:
        pushes = self.pushes.get(name, 0)
        return hashlib.sha1((name + (f"#{pushes}" if pushes else "")).encode()).hexdigest()

    def files(self, name: str) -> dict[str, Path]:
        folder = self.folders[name]
        return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}

    def branch(self, name: str, revision: str | None) -> str | None:
        """The key of a branch, or of what a commit is the head of."""
        if revision in (None, "main"):
            return name
        branches = [key for key in self.folders if key == name or key.startswith(f"{name}@")]
        found = [key for key in branches if revision == self.commit(key) or key == f"{name}@{revision}"]
        return found[0] if found else None

    def sent(self, suffix: str = "") -> int:
        """Bytes of files with names of that ending that have left."""
        return sum(request.sent for request in self.log if (request.file or "").endswith(suffix))

    def writes(self) -> list[str]:
        """Paths of what was put or posted."""
        return [request.path for request in self.log if request.method in ("PUT", "POST")]

    def new(self, name: str) -> Path:
        assert self.root is not None
        self.folders[name] = self.root / name.replace("/", "--")
        self.folders[name].mkdir(parents=True)
        return self.folders[name]


class Handler(BaseHTTPRequestHandler):
    hub: Hub  # of the class that `serving` makes
    cut: int | None = None
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        if not self.failed():
            self.answer()

    def do_GET(self) -> None:
        if not self.failed():
            self.answer()

    def do_POST(self) -> None:
        if not self.failed():
            self.take(self.body())

    def do_PUT(self) -> None:
        if not self.failed():
            self.take(self.body())

    def failed(self) -> bool:
        """Whether the request is answered with a fault."""
        self.cut = None
        path, fault = self.path_asked, self.hub.failure(self.command, self.path_asked)
        for old, new in self.hub.renamed.items():
            if f"/{old}/" in f"{path}/":
                fault = Fault(307, b"moved", {"Location": self.path.replace(old, new, 1)})
        if fault is None:
            return False
        if isinstance(fault, int):
            said = f"told to fail\r\n by {self.headers.get('Authorization')}"  # as a careless proxy might
            fault = Fault(fault, json.dumps({"error": said}).encode(), {"Content-Type": "application/json"})
        if fault.cut is not None:
            self.cut = fault.cut
            return False
        if fault.hang_up:
            self.hub.log.append(Request(self.command, path))
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return True
        if self.command in ("POST", "PUT"):
            self.body()
        self.send(fault.status, fault.body, fault.headers, path)
        return True

    @property
    def path_asked(self) -> str:
        return urlsplit(self.path).path

    @property
    def user(self) -> str | None:
        return self.hub.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self) -> None:
        path = self.path_asked
        if path == "/api/whoami-v2":
            self.reply({"name": self.user, "type": "user"}) if self.user else self.unknown()
        elif match := FILE.fullmatch(path):
            self.file(match[1], unquote(match[2]), unquote(match[3]), path)
        elif match := TREE.fullmatch(path):
            self.listing(match[1], unquote(match[2]), path, tree=True)
        elif match := INFO.fullmatch(path):
            self.listing(match[1], match[2] and unquote(match[2]), path, tree=False)
        else:
            self.missing("EntryNotFound", path)

    def visible(self, name: str, path: str) -> bool:
        """Whether there is such a repository, for this user; says so if not."""
        if name in self.hub.folders and (name not in self.hub.private or self.user == name.split("/")[0]):
            return True
        self.missing("RepoNotFound", path) if self.user else self.unknown()
        return False

    def listing(self, name: str, revision: str | None, path: str, *, tree: bool) -> None:
        if name not in self.hub.folders and not self.headers.get("Authorization"):
            return self.missing("RepoNotFound", path)
        if not self.visible(name, path):
            return None
        branch = self.hub.branch(name, revision)
        if branch is None:
            return self.missing("RevisionNotFound", path)
        entries = [
            {"type": "file", "path": file, "rfilename": file, "size": place.stat().st_size, "oid": etag(place)}
            for file, place in self.hub.files(branch).items()
        ]
        info = {
            "id": name,
            "modelId": name,
            "sha": self.hub.commit(branch),
            "private": name in self.hub.private,
            "siblings": entries,
            "tags": [],
        }
        return self.reply(entries if tree else info)

    def file(self, name: str, revision: str, wanted: str, path: str) -> None:
        if name not in self.hub.folders and not self.headers.get("Authorization"):
            return self.missing("RepoNotFound", path)
        if not self.visible(name, path):
            return None
        if name in self.hub.gated:
            said = f"Access to model {name} is restricted. You must have access to it and be authenticated."
            return self.send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": said}, path)
        branch = self.hub.branch(name, revision)
        if branch is None:
            return self.missing("RevisionNotFound", path)
        file = self.hub.folders[branch] / wanted
        if not file.is_file():
            return self.missing("EntryNotFound", path, {"X-Repo-Commit": self.hub.commit(branch)})
        data, status = file.read_bytes(), 200
        headers = {"ETag": f'"{etag(file)}"', "X-Repo-Commit": self.hub.commit(branch), "Accept-Ranges": "bytes"}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            begin, end = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
            data, status = data[begin:end], 206
        return self.send(status, data, headers, path)

    def take(self, body: bytes) -> None:
        """What is written: by known users into their own repositories, pull requests into anybody's."""
        path = self.path_asked
        if match := OBJECT.fullmatch(path):  # no token: its address was given to who had one
            assert hashlib.sha256(body).hexdigest() == match[1]
            self.hub.objects[match[1]] = body
            return self.reply({})
        if self.user is None:
            return self.unknown()
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if match := BATCH.fullmatch(path):
            return self.batch(json.loads(body)["objects"])
        if match := WRITE.fullmatch(path):
            return self.change(match[1], match[2], unquote(match[3]), body) if self.visible(match[1], path) else None
        return self.missing("EntryNotFound", path)

    def change(self, name: str, action: str, revision: str, body: bytes) -> None:
        """Of a repository that this user can see."""
        proposed = "create_pr=1" in self.path
        if self.user != name.split("/")[0] and not proposed:
            return self.reply({"error": "Forbidden"}, 403, {"X-Error-Message": "no write access"})
        if action == "branch":
            return self.fork(name, revision)
        branch = self.hub.branch(name, revision)
        if branch is None:
            return self.missing("RevisionNotFound", self.path_asked)
        if action == "preupload":
            return self.modes(branch, json.loads(body)["files"])
        return self.commit(name, branch, [json.loads(line) for line in body.splitlines()], proposed)

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        if not name.startswith(f"{self.user}/"):
            return self.reply({"error": "Forbidden"}, 403, {"X-Error-Message": "not your namespace"})
        if name in self.hub.folders:
            return self.reply({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        self.hub.new(name)
        if wanted.get("visibility") == "private" or wanted.get("private"):
            self.hub.private.add(name)
        return self.reply({"url": f"{self.hub.url}/{name}"})

    def validate(self, text: str) -> None:
        try:
            block = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])  # type: ignore[index]
            faults = [] if isinstance(block, dict) else ["no mapping"]
        except (yaml.YAMLError, TypeError) as error:
            faults = [str(error)]
        self.reply({"errors": [{"message": one} for one in faults], "warnings": []}, 400 if faults else 200)

    def batch(self, objects: list[dict[str, Any]]) -> None:
        answers = []
        for one in objects:
            known = one["oid"] in self.hub.objects
            upload = {"upload": {"href": f"{self.hub.url}/objects/{one['oid']}"}}
            answers.append({"oid": one["oid"], "size": one["size"], **({} if known else {"actions": upload})})
        self.reply({"transfer": "basic", "objects": answers})

    def fork(self, name: str, branch: str) -> None:
        if self.hub.branch(name, branch) is not None:
            return self.reply({"error": "Reference already exists"}, 409)
        shutil.copytree(self.hub.folders[name], self.hub.new(f"{name}@{branch}"), dirs_exist_ok=True)
        return self.reply({})

    def modes(self, branch: str, files: list[dict[str, Any]]) -> None:
        answers = []
        for one in files:
            large = one["path"].endswith(".safetensors")
            there = self.hub.files(branch).get(one["path"])
            answers.append(
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    **({"oid": oid(there, large)} if there else {}),
                }
            )
        self.reply({"files": answers})

    def commit(self, name: str, branch: str, lines: list[dict[str, Any]], proposed: bool) -> None:
        if proposed:
            source, branch = self.hub.folders[branch], f"{name}@refs/pr/1"
            shutil.copytree(source, self.hub.new(branch), dirs_exist_ok=True)
        folder = self.hub.folders[branch]
        for line in lines[1:]:
            what, place = line["value"], folder / line["value"]["path"]
            place.parent.mkdir(parents=True, exist_ok=True)
            if line["key"] == "file":
                place.write_bytes(base64.b64decode(what["content"]))
            elif line["key"] == "lfsFile":
                place.write_bytes(self.hub.objects[what["oid"]])
            else:
                assert line["key"] == "deletedFile", line
                place.unlink()
        self.hub.pushes[branch] = self.hub.pushes.get(branch, 0) + 1
        head = self.hub.commit(branch)
        request = {"pullRequestUrl": f"{self.hub.url}/{name}/discussions/1"} if proposed else {}
        self.reply({"commitUrl": f"{self.hub.url}/{name}/commit/{head}", "commitOid": head, **request})

    def unknown(self) -> None:
        self.reply({"error": "Invalid credentials"}, 401, {"X-Error-Message": "Invalid credentials"})

    def missing(self, code: str, path: str, headers: dict[str, str] | None = None) -> None:
        said = {"X-Error-Code": code, "X-Error-Message": f"{code} here", **(headers or {})}
        self.send(404, json.dumps({"error": code}).encode(), said, path)

    def reply(self, values: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        said = {"Content-Type": "application/json", **(headers or {})}
        self.send(status, json.dumps(values).encode(), said, unquote(self.path_asked))

    def send(self, status: int, data: bytes, headers: dict[str, str], path: str) -> None:
        body = self.command != "HEAD"
        self.hub.log.append(Request(self.command, path, len(data) if body else 0))
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(header, value)
        self.end_headers()
        if body:
            self.wfile.write(data[: self.cut])
        if body and self.cut is not None:
            self.wfile.flush()
            self.close_connection = True


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def oid(file: Path, large: bool) -> str:
    """What the client compares its own file with."""
    data = file.read_bytes()
    return hashlib.sha256(data).hexdigest() if large else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
