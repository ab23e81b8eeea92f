"""A Hub on the loopback interface: the read endpoints that huggingface_hub uses, and a log of what was asked for."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

INFO = re.compile(r"/api/(?:models|datasets)/([^/]+/[^/]+?)(?:/revision/([^/]+))?")
TREE = re.compile(r"/api/(?:models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/data)?")
FILE = re.compile(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


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


@dataclass
class Hub:
    """Repositories by id, each a local folder with one commit."""

    folders: dict[str, Path] = field(default_factory=dict)
    log: list[Request] = field(default_factory=list)
    url: str = ""

    def add(self, name: str, folder: Path) -> str:
        """Publish a folder; returns its commit."""
        self.folders[name] = folder
        return self.commit(name)

    def commit(self, name: str) -> str:
        return hashlib.sha1(name.encode()).hexdigest()

    def files(self, name: str) -> list[Path]:
        return sorted(path for path in self.folders[name].iterdir() if path.is_file())

    def knows(self, name: str, revision: str | None) -> bool:
        return revision in (None, "main", self.commit(name))

    def sent(self, suffix: str = "") -> int:
        """Bytes of files with names of that ending that have left."""
        return sum(request.sent for request in self.log if (request.file or "").endswith(suffix))


class Handler(BaseHTTPRequestHandler):
    hub: Hub  # of the class that `serving` makes
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := FILE.fullmatch(path):
            self.file(*match.groups(), path)
        elif match := TREE.fullmatch(path):
            self.listing(match[1], match[2], path, tree=True)
        elif match := INFO.fullmatch(path):
            self.listing(match[1], match[2], path, tree=False)
        else:
            self.missing("EntryNotFound", path)

    def listing(self, name: str, revision: str | None, path: str, *, tree: bool) -> None:
        if name not in self.hub.folders:
            return self.missing("RepoNotFound", path)
        if not self.hub.knows(name, revision):
            return self.missing("RevisionNotFound", path)
        entries = [
            {
                "type": "file",
                "path": file.name,
                "rfilename": file.name,
                "size": file.stat().st_size,
                "oid": etag(file),
            }
            for file in self.hub.files(name)
        ]
        info = {
            "id": name,
            "modelId": name,
            "sha": self.hub.commit(name),
            "private": False,
            "siblings": entries,
            "tags": [],
        }
        return self.send(
            200, json.dumps(entries if tree else info).encode(), {"Content-Type": "application/json"}, path
        )

    def file(self, name: str, revision: str, wanted: str, path: str) -> None:
        if name not in self.hub.folders:
            return self.missing("RepoNotFound", path)
        if not self.hub.knows(name, revision):
            return self.missing("RevisionNotFound", path)
        file = self.hub.folders[name] / wanted
        if not file.is_file():
            return self.missing("EntryNotFound", path, {"X-Repo-Commit": self.hub.commit(name)})
        data, status = file.read_bytes(), 200
        headers = {"ETag": f'"{etag(file)}"', "X-Repo-Commit": self.hub.commit(name), "Accept-Ranges": "bytes"}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            begin, end = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
            data, status = data[begin:end], 206
        return self.send(status, data, headers, path)

    def missing(self, code: str, path: str, headers: dict[str, str] | None = None) -> None:
        said = {"X-Error-Code": code, "X-Error-Message": f"{code} here", **(headers or {})}
        self.send(404, json.dumps({"error": code}).encode(), said, path)

    def send(self, status: int, data: bytes, headers: dict[str, str], path: str) -> None:
        body = self.command == "GET"
        self.hub.log.append(Request(self.command, path, len(data) if body else 0))
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(header, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


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
