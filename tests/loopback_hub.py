"""A small Hub on the loopback interface, for the real `huggingface_hub` client.

It serves the endpoints that the client uses to make repositories, branches, commits (NDJSON, with
regular and LFS files) and pull requests, and to read them again: as seen in the client's own
source, with the headers and error codes that it looks at. Everything lives in memory.

Faults are ordered with `fail`: a status, or a body cut off half-way.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from loopback import serving

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
    from loopback_handler import HubHandler  # which is written in terms of the above

    hub = LoopbackHub()
    with serving(HubHandler, hub) as hub.url:
        yield hub
