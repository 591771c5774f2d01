"""A stand-in for the Hugging Face hub: the HTTP interface that huggingface_hub uses, in a thread, in memory."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_a_token_that_may_write"
READER = "hf_a_token_that_may_only_read"
Files = dict[str, bytes]


@dataclass
class Repo:
    """A repository: its commits, each the whole tree, and its branches."""

    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        """Put a tree on a branch; return its commit."""
        seed = json.dumps([len(self.commits), sorted((n, hashlib.sha1(b).hexdigest()) for n, b in files.items())])
        oid = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        return oid


class HubServer:
    """The server; `requests` are `METHOD path`, `received` all bytes that any client sent.

    `broken` makes it answer every request with that status, `instead` with that body and status 200; `delay` is seconds
    that it waits before it answers a request whose path holds `slow`.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: Files = {}
        self.requests: list[str] = []
        self.received = bytearray()
        self.broken = 0
        self.instead: Any = None
        self.delay, self.slow = 0.0, ""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        """End the server; its port then answers nobody."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def files(self, repo: str, branch: str = "main") -> Files:
        """The tree of a branch."""
        found = self.repos[repo]
        return found.commits[found.branches[branch]]

    # The answers: status, JSON or bytes, headers.

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any, dict[str, str]]:
        """Answer one request."""
        if self.slow in path:
            time.sleep(self.delay)
        if self.instead is not None:
            return 200, self.instead, {}
        if self.broken:
            return self.broken, {"error": "broken"}, {}
        if token not in ("", TOKEN, READER):
            return 401, {}, {"X-Error-Message": "Invalid credentials in Authorization header"}
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if method == "PUT" and parts[0] == "lfs":
            self.blobs[hashlib.sha256(body).hexdigest()] = body
            return 200, {}, {}
        if parts[0] == "lfs":
            return 200, self.blobs[parts[1]], {}
        if parts == ["api", "validate-yaml"]:
            assert json.loads(body)["content"].startswith("---\n")
            return 200, {"warnings": [], "errors": []}, {}
        if parts == ["api", "repos", "create"]:
            return self._create(json.loads(body), token)
        if parts[-3:] == ["lfs", "objects", "batch"]:
            return self._batch(json.loads(body), token)
        if parts[:2] == ["api", "models"]:
            return self._api(method, f"{parts[2]}/{parts[3]}", parts[4:], body, token)
        if parts[2:3] == ["resolve"]:
            return self._resolve(f"{parts[0]}/{parts[1]}", parts[3], "/".join(parts[4:]), token)
        return 404, {"error": "not part of this stand-in"}, {}  # what huggingface_hub asks beside its work

    def _create(self, asked: dict[str, Any], token: str) -> tuple[int, Any, dict[str, str]]:
        if token != TOKEN or asked["organization"] == "somebody":
            return 403, {}, {"X-Error-Message": "no write access"}
        repo = f"{asked['organization']}/{asked['name']}"
        private = asked.get("private") or asked.get("visibility") == "private"
        self.repos[repo] = Repo(private=bool(private))
        self.repos[repo].commit("main", {".gitattributes": b"*.onnx filter=lfs\n"})
        return 200, {"url": f"{self.url}/{repo}"}, {}

    def _batch(self, asked: dict[str, Any], token: str) -> tuple[int, Any, dict[str, str]]:
        if token != TOKEN:
            return 403, {}, {"X-Error-Message": "no write access"}
        objects = []
        for each in asked["objects"]:
            upload = {"upload": {"href": f"{self.url}/lfs/{each['oid']}"}}
            objects.append({**each, **({} if each["oid"] in self.blobs else {"actions": upload})})
        return 200, {"transfer": "basic", "objects": objects}, {}

    def _api(self, method: str, name: str, rest: list[str], body: bytes, token: str) -> tuple[int, Any, dict[str, str]]:
        repo = self._open(name, token)
        if repo is None:
            return 404 if token else 401, {}, {"X-Error-Code": "RepoNotFound"}
        if method == "GET":
            commit = self._commit(repo, rest[1] if rest else "main")
            if commit is None:
                return 404, {}, {"X-Error-Code": "RevisionNotFound"}
            siblings = [{"rfilename": file} for file in repo.commits[commit]]
            return 200, {"id": name, "sha": commit, "private": repo.private, "siblings": siblings, "tags": []}, {}
        if token != TOKEN:
            return 403, {}, {"X-Error-Message": "no write access"}
        if rest[0] == "branch":
            if rest[1] in repo.branches:
                return 409, {}, {}
            repo.branches[rest[1]] = repo.branches["main"]
            return 200, {}, {}
        if rest[0] == "preupload":
            asked = [file["path"] for file in json.loads(body)["files"]]
            modes = {file: "lfs" if file.endswith(".onnx") else "regular" for file in asked}
            return 200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}, {}
        assert rest[0] == "commit", rest
        oid = self._add(repo, rest[1], body)
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None}, {}

    def _add(self, repo: Repo, branch: str, body: bytes) -> str:
        tree = dict(repo.commits[repo.branches[branch]])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
                self.received += tree[value["path"]]  # as read, not only as base64
            elif line["key"] == "lfsFile":
                tree[value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del tree[value["path"]]
        return repo.commit(branch, tree)

    def _resolve(self, name: str, revision: str, file: str, token: str) -> tuple[int, Any, dict[str, str]]:
        repo = self._open(name, token)
        if repo is None:
            return 404 if token else 401, {}, {"X-Error-Code": "RepoNotFound"}
        commit = self._commit(repo, revision)
        if commit is None:
            return 404, {}, {"X-Error-Code": "RevisionNotFound"}
        if file not in repo.commits[commit]:
            return 404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
        data = repo.commits[commit][file]
        return 200, data, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}

    def _open(self, name: str, token: str) -> Repo | None:
        repo = self.repos.get(name)
        return None if repo is None or (repo.private and token not in (TOKEN, READER)) else repo

    @staticmethod
    def _commit(repo: Repo, revision: str) -> str | None:
        return repo.branches.get(revision) or (revision if revision in repo.commits else None)


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            path = urlsplit(self.path).path
            hub.requests.append(f"{self.command} {path}")
            hub.received += f"{self.requestline}\n{self.headers}\n".encode() + body
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            status, answer, headers = hub.answer(self.command, path, body, token)
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                with contextlib.suppress(ConnectionError):  # of a client that waits no longer
                    self.wfile.write(data)

        do_HEAD = do_POST = do_PUT = do_GET

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    return Handler
