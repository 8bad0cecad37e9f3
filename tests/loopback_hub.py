"""A small Hub on the loopback interface, for the real `huggingface_hub` client.

It serves the endpoints that the client uses to make repositories, branches, commits (NDJSON, with
regular and LFS files) and pull requests, and to read them again: as seen in the client's own
source, with the headers and error codes that it looks at. Everything lives in memory.

Faults are ordered with `fail`: a status, or a body cut off half-way.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Repo:
    """Commits are trees of whole files; a branch is the name of a commit."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: Files, message: str) -> str:
        seed = f"{len(self.commits)} {message}".encode()
        sha = hashlib.sha1(seed, usedforsecurity=False).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None


@dataclass
class Fault:
    method: str
    path: re.Pattern[str]
    times: int
    status: int | None
    cut_after: int | None


class LoopbackHub:
    """The state of the Hub and the faults it was told to have.

    Tokens: "hf_owner" may do everything in its own repositories, "hf_stranger" is a user without
    rights to them.
    """

    users = {"hf_owner": "owner", "hf_stranger": "stranger"}  # noqa: RUF012

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}  # LFS, by sha256
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.url = ""
        self.before_commit: Callable[[], None] = lambda: None
        self.lock = threading.Lock()

    def fail(
        self,
        method: str,
        path: str,
        *,
        times: int = 1,
        status: int | None = None,
        cut_after: int | None = None,
    ) -> None:
        """Answer the next `times` requests with `status`, or cut their body after some bytes."""
        self.faults.append(Fault(method, re.compile(path), times, status, cut_after))

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and fault.path.search(path) and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def files(self, repo: str, revision: str = "main") -> Files:
        """The files of a repository; large ones too."""
        found = self.repos[repo]
        return found.commits[found.resolve(revision) or ""]

    def put(self, repo: str, files: Files, branch: str = "main") -> str:
        """Commits `files` behind the client's back; returns the commit."""
        found = self.repos.setdefault(repo, Repo())
        present = found.commits.get(found.branches.get(branch, ""), {})
        return found.commit(branch, {**present, **files}, f"put {sorted(files)}")


@contextmanager
def serve() -> Iterator[LoopbackHub]:
    """A running Hub; `url` is its address."""
    hub = LoopbackHub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def is_large(path: str) -> bool:
    """Whether a file goes to LFS, as `.gitattributes` says by default."""
    return path.endswith((".safetensors", ".bin", ".png"))


class Refused(Exception):
    """An answer other than success."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    """One request. `ROUTES` says which method serves which path."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def serve(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        path = unquote(url.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {path}")
        self.cut_after: int | None = None
        fault = self.hub.fault(self.command, path)
        if fault is not None and fault.status is not None:
            self.answer(fault.status, {"error": "told to fail"})
            return
        self.cut_after = fault.cut_after if fault else None
        try:
            for method, pattern, function in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and method in (self.command, "GET" if self.command == "HEAD" else ""):
                    function(self, **found.groupdict())
                    return
            raise Refused(404, message=f"no such endpoint: {self.command} {path}")
        except Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self.answer(
                refused.status,
                {"error": refused.message},
                {name: value for name, value in headers.items() if value},
            )

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def answer(
        self, status: int, body: bytes | dict[str, Any] | list[Any], headers: Any = None
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = {
            "Content-Type": "application/json",
            "Content-Length": len(data),
            **(headers or {}),
        }
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.cut_after is not None:
            self.wfile.write(data[: self.cut_after])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(data)

    @property
    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def repo(self, name: str, *, write: bool = False) -> Repo:
        repo = self.hub.repos.get(name)
        owner = name.split("/")[0] == self.user
        if repo is None or (repo.private and not owner):
            raise Refused(401 if self.user is None else 404, "RepoNotFound", "Repository not found")
        proposes = "create_pr" in self.query
        if write and not owner and not (proposes and self.user):
            raise Refused(401 if self.user is None else 403, message="no write access")
        return repo

    def commit_of(self, repo: Repo, revision: str) -> str:
        sha = repo.resolve(revision)
        if sha is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    # The endpoints.

    def whoami(self) -> None:
        if self.user is None:
            raise Refused(401, message="Invalid username or password.")
        self.answer(200, {"type": "user", "name": self.user, "orgs": [], "auth": {}})

    def create(self) -> None:
        wanted = json.loads(self.body)
        if self.user is None:
            raise Refused(401, message="Invalid username or password.")
        owner = wanted.get("organization") or self.user
        if owner != self.user:
            raise Refused(403, message=f"no right to create under {owner}")
        name = f"{owner}/{wanted['name']}"
        found = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.hub.repos:
            self.answer(409, {"error": "You already created this model repo", **found})
            return
        private = wanted.get("private") or wanted.get("visibility") == "private"
        repo = self.hub.repos[name] = Repo(private=bool(private))
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self.answer(200, found)

    def info(self, name: str, revision: str = "main") -> None:
        repo = self.repo(name)
        sha = self.commit_of(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(repo.commits[sha])]
        self.answer(
            200, {"id": name, "sha": sha, "private": repo.private, "tags": [], "siblings": siblings}
        )

    def tree(self, name: str, revision: str, folder: str = "") -> None:
        repo = self.repo(name)
        files = repo.commits[self.commit_of(repo, revision)]
        inside = [path for path in sorted(files) if path.startswith(folder and folder + "/")]
        if folder and not inside:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist")
        rows = [
            {"type": "file", "path": x, "size": len(files[x]), "oid": oid(files[x])} for x in inside
        ]
        self.answer(200, rows)

    def branch(self, name: str, branch: str) -> None:
        repo = self.repo(name, write=True)
        if branch in repo.branches:
            self.answer(409, {"error": f"Reference already exists: {branch}"})
            return
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repo.branches[branch] = self.commit_of(repo, start)
        self.answer(200, {})

    def preupload(self, name: str, revision: str) -> None:
        repo = self.repo(name, write=True)
        present = repo.commits[self.commit_of(repo, revision)]
        rows = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            mode = "lfs" if is_large(path) else "regular"
            row = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            if path in present:
                large = hashlib.sha256(present[path]).hexdigest()
                row["oid"] = large if is_large(path) else oid(present[path])
            rows.append(row)
        self.answer(200, {"files": rows})

    def lfs_batch(self, name: str) -> None:
        self.repo(name)
        rows = []
        for wanted in json.loads(self.body)["objects"]:
            row = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.blobs:
                base = f"{self.hub.url}/lfs/{wanted['oid']}"
                row["actions"] = {"upload": {"href": base}, "verify": {"href": f"{base}/verify"}}
            rows.append(row)
        self.answer(200, {"transfer": "basic", "objects": rows})

    def lfs_put(self, digest: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != digest:
            raise Refused(400, message="the content is not what was announced")
        self.hub.blobs[digest] = self.body
        self.answer(200, {})

    def lfs_verify(self, digest: str) -> None:
        if len(self.hub.blobs.get(digest, b"")) != json.loads(self.body)["size"]:
            raise Refused(400, message="size mismatch")
        self.answer(200, {})

    def commit(self, name: str, revision: str) -> None:
        repo = self.repo(name, write=True)
        lines = [json.loads(line) for line in self.body.splitlines()]
        assert [line["key"] for line in lines].index("header") == 0
        header = lines[0]["value"]
        self.hub.before_commit()
        head = self.commit_of(repo, revision)
        proposes = "create_pr" in self.query
        if not proposes and header.get("parentCommit", head) != head:
            raise Refused(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[head])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            else:
                files.pop(value["path"])
        target = f"refs/pr/{len(repo.branches)}" if proposes else revision
        sha = repo.commit(target, files, header["summary"])
        number = target.removeprefix("refs/pr/")
        self.answer(
            200,
            {
                "success": True,
                "commitOid": sha,
                "commitUrl": f"{self.hub.url}/{name}/commit/{sha}",
                "pullRequestUrl": f"{self.hub.url}/{name}/discussions/{number}",
            },
        )

    def validate_yaml(self) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def resolve(self, name: str, revision: str, file: str) -> None:
        repo = self.repo(name)
        sha = self.commit_of(repo, revision)
        data = repo.commits[sha].get(file)
        headers = {"X-Repo-Commit": sha}
        if data is None:
            self.answer(
                404, {}, {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "no entry"}
            )
        elif is_large(file):
            digest = hashlib.sha256(data).hexdigest()
            self.hub.blobs[digest] = data
            linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": len(data)}
            # Under another host name, as the real one's storage is: the client looks at that.
            storage = self.hub.url.replace("127.0.0.1", "localhost")
            place = {"Location": f"{storage}/lfs/{digest}"}
            self.answer(302, {}, {**headers, **linked, **place})
        else:
            self.send_range(data, {**headers, "ETag": f'"{oid(data)}"'})

    def lfs_get(self, digest: str) -> None:
        if self.headers.get("Authorization"):
            raise Refused(400, message="storage takes signed links, and refuses a token")
        self.send_range(self.hub.blobs[digest], {"ETag": f'"{digest}"'})

    def send_range(self, data: bytes, headers: dict[str, Any]) -> None:
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if found is None:
            self.answer(200, data, headers)
            return
        start = int(found[1])
        place = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        self.answer(206, data[start:], {**headers, **place})


def oid(data: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


_REPO = r"(?P<name>[^/]+/[^/]+)"
_API = f"/api/models/{_REPO}"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", _API, Handler.info),
    ("GET", f"{_API}/revision/(?P<revision>.+)", Handler.info),
    ("GET", f"{_API}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", Handler.tree),
    ("POST", f"{_API}/branch/(?P<branch>.+)", Handler.branch),
    ("POST", f"{_API}/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", f"{_API}/commit/(?P<revision>.+)", Handler.commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/lfs/(?P<digest>[0-9a-f]+)", Handler.lfs_put),
    ("GET", "/lfs/(?P<digest>[0-9a-f]+)", Handler.lfs_get),
    ("POST", "/lfs/(?P<digest>[0-9a-f]+)/verify", Handler.lfs_verify),
    ("GET", f"/{_REPO}/resolve/(?P<revision>refs/pr/[^/]+|[^/]+)/(?P<file>.+)", Handler.resolve),
]
