"""The endpoints of the loopback Hub: see `loopback_hub`."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from loopback import JsonHandler
from loopback_hub import LoopbackHub, Repo


def is_large(path: str) -> bool:
    """Whether a file goes to LFS, as `.gitattributes` says by default."""
    return path.endswith((".safetensors", ".bin", ".png"))


class Refused(Exception):
    """An answer other than success."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class HubHandler(JsonHandler):
    """One request. `ROUTES` says which method serves which path."""

    hub: LoopbackHub

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

    def send_body(self, data: bytes) -> None:
        if self.cut_after is not None:
            data = data[: self.cut_after]
            self.close_connection = True
        super().send_body(data)
        self.wfile.flush()

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
    ("GET", "/api/whoami-v2", HubHandler.whoami),
    ("POST", "/api/repos/create", HubHandler.create),
    ("POST", "/api/validate-yaml", HubHandler.validate_yaml),
    ("GET", _API, HubHandler.info),
    ("GET", f"{_API}/revision/(?P<revision>.+)", HubHandler.info),
    ("GET", f"{_API}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", HubHandler.tree),
    ("POST", f"{_API}/branch/(?P<branch>.+)", HubHandler.branch),
    ("POST", f"{_API}/preupload/(?P<revision>.+)", HubHandler.preupload),
    ("POST", f"{_API}/commit/(?P<revision>.+)", HubHandler.commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", HubHandler.lfs_batch),
    ("PUT", "/lfs/(?P<digest>[0-9a-f]+)", HubHandler.lfs_put),
    ("GET", "/lfs/(?P<digest>[0-9a-f]+)", HubHandler.lfs_get),
    ("POST", "/lfs/(?P<digest>[0-9a-f]+)/verify", HubHandler.lfs_verify),
    ("GET", f"/{_REPO}/resolve/(?P<revision>refs/pr/[^/]+|[^/]+)/(?P<file>.+)", HubHandler.resolve),
]
