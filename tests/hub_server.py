# SPDX-License-Identifier: Apache-2.0
"""A small Hub on loopback: as much of its protocol as huggingface_hub needs to push a model and to load it again.

Repositories are lists of commits in memory; large files go through Git LFS. Not here: Xet, multipart uploads, branches
other than main.
"""

import base64
import hashlib
import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants, hf_api

Tree = dict[str, bytes]


class Refusal(Exception):
    """An answer with an error: status, X-Error-Code if the Hub sends one, and what it says."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    trees: dict[str, Tree] = field(default_factory=lambda: {"0" * 40: {}})
    """The files of every commit, by its hash, in order."""

    @property
    def head(self) -> str:
        return list(self.trees)[-1]

    @property
    def files(self) -> Tree:
        return self.trees[self.head]


@dataclass
class Hub:
    """What the server knows; tests look at it and change it."""

    users: dict[str, str] = field(default_factory=lambda: {"good-token": "user"})
    """Names by token."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    """What Git LFS stores, by sha256."""

    breaks_off_at: str | None = None
    """The sha256 of a file whose upload never succeeds: the connection closes in its middle."""

    url: str = ""


class Answers(BaseHTTPRequestHandler):
    """One request; `hub` and the routes below say what is answered."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = b""
        try:
            for method, pattern, answer in ROUTES:
                if self.command in method and (match := re.fullmatch(pattern, path)):
                    answer(self, **match.groupdict())
                    return
            raise Refusal(404, None, f"This hub does not know {self.command} {path}")
        except Refusal as refusal:
            self.reply({"error": str(refusal)}, refusal.status, {"X-Error-Code": refusal.code or ""})

    do_GET = do_HEAD = do_POST = do_PUT = do  # noqa: N815

    def reply(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.rest()
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        if status >= 400:
            self.send_header("X-Error-Message", content["error"])
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def rest(self) -> bytes:
        """The request's body, read once."""
        self.body = self.body or self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return self.body

    @property
    def user(self) -> str | None:
        """Whose token was sent; None without one."""
        _, _, token = self.headers.get("Authorization", "").partition("Bearer ")
        if token and token not in self.hub.users:
            raise Refusal(401, None, "Invalid username or password.")
        return self.hub.users.get(token)

    def repository(self, name: str) -> Repository:
        """One that the user may know of. The Hub does not tell strangers whether a private one exists."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self.user != name.split("/")[0]):
            raise Refusal(404 if self.user else 401, "RepoNotFound", "Repository not found")
        return found

    def tree(self, name: str, revision: str) -> tuple[str, Tree]:
        """A commit's hash and files, if the user may read them."""
        repository = self.repository(name)
        if repository.gated and self.user != name.split("/")[0]:
            raise Refusal(403, "GatedRepo", f"Access to model {name} is restricted: ask for it on its page.")
        commit = repository.head if revision == "main" else revision
        if commit not in repository.trees:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repository.trees[commit]

    def writable(self, name: str) -> Repository:
        self.tree(name, "main")
        if self.user != name.split("/")[0]:
            raise Refusal(403, None, f"You may not write to {name}.")
        return self.hub.repositories[name]

    def log_message(self, *arguments: Any) -> None:
        """Nothing: tests are quiet."""


def create(request: Answers) -> None:
    asked = json.loads(request.rest())
    if (user := request.user) is None:
        raise Refusal(401, None, "Invalid username or password.")
    name = f"{asked['organization'] or user}/{asked['name']}"
    if not name.startswith(f"{user}/"):
        raise Refusal(403, None, f"You may not create {name}.")
    existed = name in request.hub.repositories
    private = asked.get("visibility") == "private" or bool(asked.get("private"))  # huggingface_hub 2 and 1.5
    request.hub.repositories.setdefault(name, Repository(private=private))
    request.reply(
        {"error": "You already created this model repo", "url": f"{request.hub.url}/{name}"}, 409 if existed else 200
    )


def may_write(request: Answers, name: str) -> None:
    request.writable(name)
    request.reply({})


def model_info(request: Answers, name: str, revision: str = "main") -> None:
    repository = request.repository(name)
    commit = repository.head if revision == "main" else revision
    if commit not in repository.trees:
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    request.reply({"id": name, "sha": commit, "private": repository.private, "gated": repository.gated})


def listing(request: Answers, name: str, revision: str) -> None:
    _, tree = request.tree(name, revision)
    request.reply([{"type": "file", "path": p, "size": len(data), "oid": oid_of(data)} for p, data in tree.items()])


def check_card(request: Answers) -> None:
    request.reply({"warnings": [], "errors": []})


def preupload(request: Answers, name: str) -> None:
    files = request.writable(name).files
    request.reply(
        {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                    "shouldIgnore": False,
                    "oid": oid_of(files[file["path"]], is_large(file["path"])) if file["path"] in files else None,
                }
                for file in json.loads(request.rest())["files"]
            ]
        }
    )


def lfs_batch(request: Answers, name: str) -> None:
    """Where to put each file; nowhere, if it is there."""
    request.writable(name)
    objects = [
        {"oid": x["oid"], "size": x["size"]}
        | (
            {}
            if x["oid"] in request.hub.large
            else {"actions": {"upload": {"href": f"{request.hub.url}/lfs/{x['oid']}"}}}
        )
        for x in json.loads(request.rest())["objects"]
    ]
    request.reply({"transfer": "basic", "objects": objects})


def lfs_upload(request: Answers, oid: str) -> None:
    if oid == request.hub.breaks_off_at:
        request.rfile.read(int(request.headers["Content-Length"]) // 2)
        request.connection.shutdown(socket.SHUT_RDWR)
        request.close_connection = True
        return
    data = request.rest()
    assert hashlib.sha256(data).hexdigest() == oid
    request.hub.large[oid] = data
    request.reply({})


def commit(request: Answers, name: str) -> None:
    repository = request.writable(name)
    files = dict(repository.files)
    for line in request.rest().splitlines():
        match json.loads(line):
            case {"key": "file", "value": {"path": path, "content": content}}:
                files[path] = base64.b64decode(content)
            case {"key": "lfsFile", "value": {"path": path, "oid": oid}}:
                files[path] = request.hub.large[oid]
            case {"key": "deletedFile", "value": {"path": path}}:
                del files[path]
    sha = hashlib.sha1(f"{repository.head} {sorted(files)}".encode()).hexdigest()
    repository.trees[sha] = files
    request.reply({"commitUrl": f"{request.hub.url}/{name}/commit/{sha}", "commitOid": sha})


def resolve(request: Answers, name: str, revision: str, path: str) -> None:
    sha, tree = request.tree(name, revision)
    if path not in tree:
        raise Refusal(404, "EntryNotFound", "Entry not found")
    data = tree[path]
    headers = {"X-Repo-Commit": sha, "ETag": f'"{oid_of(data)}"', "Content-Type": "application/octet-stream"}
    if is_large(path):
        headers |= {"X-Linked-Etag": f'"{oid_of(data, large=True)}"', "X-Linked-Size": str(len(data))}
    request.reply(data, headers=headers)


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def oid_of(data: bytes, large: bool = False) -> str:
    """Git's name of a blob, or Git LFS's."""
    return hashlib.sha256(data).hexdigest() if large else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


NAME = r"(?P<name>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES = [
    (("POST",), "/api/repos/create", create),
    (("GET",), f"/api/models/{NAME}/auth-check/write", may_write),
    (("GET",), f"/api/models/{NAME}", model_info),
    (("GET",), f"/api/models/{NAME}/revision/{REVISION}", model_info),
    (("GET",), f"/api/models/{NAME}/tree/{REVISION}", listing),
    (("POST",), "/api/validate-yaml", check_card),
    (("POST",), f"/api/models/{NAME}/preupload/main", preupload),
    (("POST",), rf"/{NAME}\.git/info/lfs/objects/batch", lfs_batch),
    (("PUT",), "/lfs/(?P<oid>[0-9a-f]{64})", lfs_upload),
    (("POST",), f"/api/models/{NAME}/commit/main", commit),
    (("GET", "HEAD"), f"/{NAME}/resolve/{REVISION}/(?P<path>.+)", resolve),
]


def talk_to(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `hub` the one that this process talks to: what clients have read from the environment is replaced."""
    url = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    # Clients that were made before, and one that is made now and would be asked for a hub that is gone.
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)


@contextmanager
def serve() -> Iterator[Hub]:
    """A fresh hub, until the end of the block."""
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (Answers,), {"hub": hub})) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
