"""A stand-in for the Hugging Face hub: the endpoints that ``huggingface_hub`` calls to upload a folder and get a file.

It speaks HTTP on a port of this machine and keeps what arrives. Large files come by the LFS protocol, others within the
commit, as on the hub.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_of_the_stand_in"
COMMIT = "a" * 40
LARGE = (".h5", ".png")


@dataclass
class Hub:
    """What arrived, and how it answers.

    Attributes:
        url: Where it listens.
        refuses: A status for every request; 0 for none.
        repositories: Type and id -> what it was made with.
        files: Branch -> name -> bytes, of the last commit.
        large: Objects by their SHA-256.
    """

    url: str = ""
    refuses: int = 0
    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)
    branches: list[str] = field(default_factory=lambda: ["main"])
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON of one request."""
        for (verb, pattern), reply in REPLIES.items():
            if verb == method and (found := re.fullmatch(pattern, path)):
                return reply(self, found.groups(), body)
        return 404, {"error": f"no such endpoint of the stand-in: {method} {path}"}

    def make(self, groups: tuple[str, ...], body: bytes) -> tuple[int, Any]:
        asked = json.loads(body)
        name = f"{asked['type']}s/{asked['organization']}/{asked['name']}"
        known = name in self.repositories
        self.repositories.setdefault(name, asked)
        url = f"{self.url}/{name.removeprefix('models/')}"
        return 409 if known else 200, {"url": url, **({"error": "You already created this repo"} if known else {})}

    def validate(self, groups: tuple[str, ...], body: bytes) -> tuple[int, Any]:
        _, metadata, _ = json.loads(body)["content"].split("---\n", 2)
        assert yaml.safe_load(metadata)["tags"]
        return 200, {"errors": [], "warnings": []}

    def branch(self, groups: tuple[str, ...], body: bytes) -> tuple[int, Any]:
        self.branches.append(groups[1])
        return 200, {}

    def preupload(self, groups: tuple[str, ...], body: bytes) -> tuple[int, Any]:
        assert groups[0] in self.repositories
        assert groups[1] in self.branches
        names = [file["path"] for file in json.loads(body)["files"]]
        modes = {name: "lfs" if name.endswith(LARGE) else "regular" for name in names}
        return 200, {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]}

    def batch(self, groups: tuple[str, ...], body: bytes) -> tuple[int, Any]:
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.url}/large/{wanted['oid']}"}}}
            for wanted in json.loads(body)["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}

    def put(self, groups: tuple[str, ...], body: bytes) -> tuple[int, Any]:
        assert hashlib.sha256(body).hexdigest() == groups[0]
        self.large[groups[0]] = body
        return 200, {}

    def commit(self, groups: tuple[str, ...], body: bytes) -> tuple[int, Any]:
        kept = self.files.setdefault(groups[1], {})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                kept[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                kept[value["path"]] = self.large[value["oid"]]
        return 200, {"commitUrl": f"{self.url}/{groups[0]}/commit/{COMMIT}", "commitOid": COMMIT}


REPLIES = {
    ("POST", "/api/repos/create"): Hub.make,
    ("POST", "/api/validate-yaml"): Hub.validate,
    ("POST", "/api/(.+)/branch/(.+)"): Hub.branch,
    ("POST", "/api/(.+)/preupload/(.+)"): Hub.preupload,
    ("POST", r"/(.+)\.git/info/lfs/objects/batch"): Hub.batch,
    ("PUT", "/large/(.+)"): Hub.put,
    ("POST", "/api/(.+)/commit/(.+)"): Hub.commit,
}


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A hub for as long as the block lasts."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

        def handle_any(self) -> None:
            body, path = self.body(), self.path.partition("?")[0]
            if hub.refuses:
                self.reply(hub.refuses, json.dumps({"error": "not you"}).encode())
            elif found := re.fullmatch("/(.+)/resolve/(.+?)/(.+)", path):
                content = hub.files[found[2]][found[3]]
                self.reply(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', **{"X-Repo-Commit": COMMIT})
            elif not path.startswith("/large/") and self.headers["Authorization"] != f"Bearer {TOKEN}":
                self.reply(401, json.dumps({"error": "Invalid username or password."}).encode())
            else:
                status, answer = hub.answer(self.command, path, body)
                self.reply(status, json.dumps(answer).encode())

        do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

        def body(self) -> bytes:
            if self.headers["Transfer-Encoding"] != "chunked":
                return self.rfile.read(int(self.headers["Content-Length"] or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def reply(self, status: int, content: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
