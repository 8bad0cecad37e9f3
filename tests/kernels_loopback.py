"""A Hub on the loopback interface that serves one kernel repo, read-only, to the real clients.

What `kernels.get_kernel` asks for: who publishes the repo, its branches, its tree, its files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from loopback import JsonHandler, serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class KernelHub:
    """`files` of the branch v1 of `repo_id`, whose publisher is trusted or not."""

    repo_id: str
    files: dict[str, bytes]
    trusted: bool = False
    url: str = ""
    requests: list[str] = field(default_factory=list)


@contextmanager
def serve(repo_id: str, folder: Path) -> Iterator[KernelHub]:
    """A running Hub with the files of `folder` below build/."""
    files = {
        f"build/{file.relative_to(folder).as_posix()}": file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and not {".lock", "__pycache__"} & set(file.parts)
    }
    hub = KernelHub(repo_id, files)
    with serving(KernelHandler, hub) as hub.url:
        yield hub


class KernelHandler(JsonHandler):
    hub: KernelHub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(path)
        repo = re.escape(self.hub.repo_id)
        if path.startswith("/api/organizations/"):
            self.answer(
                200, {"name": "x", "fullname": "x", "trustedKernelPublisher": self.hub.trusted}
            )
        elif path == f"/api/kernels/{self.hub.repo_id}/refs":
            branch = {"name": "v1", "ref": "refs/heads/v1", "targetCommit": COMMIT}
            self.answer(200, {"branches": [branch], "converts": [], "tags": []})
        elif re.fullmatch(rf"/api/kernels/{repo}(/revision/.+)?", path):
            siblings = [{"rfilename": name} for name in sorted(self.hub.files)]
            self.answer(200, {"id": self.hub.repo_id, "sha": COMMIT, "siblings": siblings})
        elif found := re.fullmatch(rf"/api/kernels/{repo}/tree/[^/]+(?:/(.+))?", path):
            recursive = "recursive=true" in urlsplit(self.path).query.lower()
            self.answer(200, self.tree(found[1] or "", recursive))
        elif found := re.fullmatch(rf"/kernels/{repo}/resolve/[^/]+/(.+)", path):
            self.send_file(found[1])
        else:
            self.answer(404, {"error": f"no such endpoint: {path}"})

    do_HEAD = do_GET

    def tree(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """What lies in `folder`: all files, or only its folders (it holds no files)."""
        below = [x for x in sorted(self.hub.files) if x.startswith(folder)]
        if recursive:
            return [
                {"type": "file", "path": x, "size": len(self.hub.files[x]), "oid": COMMIT}
                for x in below
            ]
        names = {x[len(folder) :].strip("/").split("/")[0] for x in below}
        return [
            {"type": "directory", "path": f"{folder}/{name}", "oid": COMMIT}
            for name in sorted(names)
        ]

    def send_file(self, name: str) -> None:
        if name not in self.hub.files:
            self.answer(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        data = self.hub.files[name]
        etag = hashlib.sha1(data, usedforsecurity=False).hexdigest()
        self.answer(200, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'})
