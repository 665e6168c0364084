"""A local stand-in for the HTTP interface of the hub, as far as models are read and written through huggingface_hub.

It keeps repositories in memory: revisions with files, private and gated ones, tokens that may only read. Weights travel
as LFS objects and small files inside the commit, as on the hub. Every request is noted.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

WRITES, READS = "hf_writes", "hf_reads"
"""The tokens that the stand-in knows."""


@dataclass
class Repository:
    """Files by revision. ``main`` changes with every commit, and each commit stays as a revision of its own."""

    revisions: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    private: bool = False
    gated: bool = False
    messages: list[str] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.revisions["main"]

    def commit_of(self, revision: str) -> str:
        found = self.revisions[revision]
        return hashlib.sha1(
            repr(sorted((name, hashlib.sha1(data).digest()) for name, data in found.items())).encode()
        ).hexdigest()

    def find(self, revision: str) -> dict[str, bytes] | None:
        for name in self.revisions:
            if revision in (name, self.commit_of(name)):
                return self.revisions[name]
        return None


class LocalHub:
    """The server and what it holds; `address` is what HF_ENDPOINT is set to."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def add(self, name: str, folder: Path, revision: str = "main", **settings: bool) -> Repository:
        """Put the files of a folder into a repository."""
        found = self.repositories.setdefault(name, Repository(**settings))
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        found.revisions[revision] = files
        return found


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        content = self.body()
        if path == "/api/validate-yaml":
            return self.answer(200, {"warnings": [], "errors": []})
        if path == "/api/repos/create":
            return self.create(json.loads(content))
        if match := re.fullmatch(r"/objects/(\w+)", path):
            self.hub.objects[match[1]] = content
            return self.answer(200)
        patterns = {
            r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|refs|preupload|commit))?(?:/([^/]+))?": self.interface,
            r"/([^/]+/[^/]+)\.git/(info)/lfs/objects/(batch)": self.interface,
            r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)": self.resolve,
        }
        for pattern, function in patterns.items():
            if match := re.fullmatch(pattern, path):
                return function(content, *match.groups())
        return self.refuse(404, "RepoNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if self.token != WRITES:
            return self.refuse(403, "Forbidden")
        # The hub makes a repository public unless it is told otherwise.
        self.hub.repositories[name] = Repository(
            {"main": {".gitattributes": b"x"}}, private=wanted.get("private") or wanted.get("visibility") == "private"
        )
        return self.answer(200, {"url": f"{self.hub.address}/{name}"})

    def repository(self, name: str) -> Repository | None:
        """The repository, or None after the refusal was sent."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self.token not in (WRITES, READS)):
            self.refuse(401, "RepoNotFound")
            return None
        if found.gated and self.token not in (WRITES, READS):
            self.refuse(403, "GatedRepo")
            return None
        return found

    def interface(self, content: bytes, name: str, action: str | None, argument: str | None) -> None:
        found = self.repository(name)
        if found is None:
            return None
        if action == "refs":
            branches = [
                {"name": n, "ref": f"refs/heads/{n}", "targetCommit": found.commit_of(n)} for n in found.revisions
            ]
            return self.answer(200, {"branches": branches, "tags": [], "converts": []})
        if action in ("preupload", "commit", "info"):
            return self.write(found, name, action, content)
        files = found.find(argument or "main")
        if files is None:
            return self.refuse(404, "RevisionNotFound")
        if action == "tree":
            return self.answer(200, [self.entry(path, data) for path, data in files.items()])
        siblings = [{"rfilename": path} for path in files]
        sha = next(found.commit_of(n) for n in found.revisions if found.revisions[n] is files)
        about = {"id": name, "modelId": name, "sha": sha, "private": found.private, "siblings": siblings, "tags": []}
        return self.answer(200, about)

    def entry(self, path: str, data: bytes) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def resolve(self, content: bytes, name: str, revision: str, path: str) -> None:
        found = self.repository(name)
        if found is None:
            return None
        files = found.find(revision)
        if files is None:
            return self.refuse(404, "RevisionNotFound")
        if path not in files:
            return self.refuse(404, "EntryNotFound")
        commit = next(found.commit_of(n) for n in found.revisions if found.revisions[n] is files)
        etag = hashlib.sha1(files[path]).hexdigest()
        return self.answer(200, files[path], {"X-Repo-Commit": commit, "ETag": f'"{etag}"'})

    def write(self, found: Repository, name: str, action: str, content: bytes) -> None:
        if self.token != WRITES:
            return self.refuse(403, "Forbidden")
        if action == "preupload":
            names = [each["path"] for each in json.loads(content)["files"]]
            modes = {path: "lfs" if path.endswith((".safetensors", ".png")) else "regular" for path in names}
            return self.answer(
                200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}
            )
        if action == "info":
            objects = json.loads(content)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{self.hub.address}/objects/{each['oid']}", "header": {}}}
            return self.answer(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/json"})
        files = dict(found.files)
        for line in map(json.loads, content.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                found.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                data = self.hub.objects[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"]
                files[value["path"]] = data
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        found.revisions["main"] = files
        commit = found.commit_of("main")
        found.revisions[commit] = dict(files)
        url = f"{self.hub.address}/{name}/commit/{commit}"
        return self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url})


@contextmanager
def local_hub(cache: Path, token: str = "") -> Iterator[LocalHub]:
    """A stand-in that huggingface_hub in this process talks to, with an empty cache and one token."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    hub = LocalHub()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.address)
        template = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
        patch.setattr("huggingface_hub.hf_api.api.endpoint", hub.address)
        patch.delenv("HF_TOKEN", raising=False)
        patch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        if token:
            patch.setenv("HF_TOKEN", token)
        close_session()  # one of offline mode refuses every request
        try:
            yield hub
        finally:
            hub.server.shutdown()
            hub.server.server_close()
    close_session()
