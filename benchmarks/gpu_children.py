"""The child processes of `gpu_check.py`: what runs on the GPU runs there, within time limits."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]

#: Seconds to import torch in, on a machine that has never done so; and to end in.
STARTUP = 90.0


class Child:
    """A running `gpu_worker`, its lines of JSON and its last words."""

    def __init__(self, arguments: list[str]) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu_worker", *arguments]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that compilers it started die with it
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.errors: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors = [*self.errors[-20:], line.strip()]

    def next(self, limit: float) -> Row | None:
        """The next message; None at the end.

        Raises:
            TimeoutError: none came within `limit` seconds.
        """
        end = time.monotonic() + limit
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"no answer within {limit:.0f} s") from None
            if line is None:
                return None
            if line.startswith("{"):
                return dict(json.loads(line))

    def end(self) -> int:
        """Ends the process and what it started; its exit status."""
        end_group(self.process)
        self.listener.join(timeout=5)
        return self.process.returncode


def end_group(process: subprocess.Popen[str]) -> None:
    try:
        process.wait(timeout=5 if process.poll() is None else 0)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_cases(
    groups: list[str],
    options: list[str],
    *,
    case_limit: float,
    deadline: float,
    tell: Callable[[Row], None] = lambda _: None,
) -> list[Row]:
    """The rows of all cases of `groups`: each has `ok`, or `left_out` with the reason.

    Args:
        groups: of `gpu_worker`.
        options: more arguments for it.
        case_limit: seconds that one case may take.
        deadline: of `time.monotonic()`, for all of them.
        tell: gets each row as soon as it is there.
    """
    rows = _Rows(tell)
    while True:
        done = [row["name"] for row in rows]
        child = Child([*groups, *options, "--done", *done])
        running: Row | None = None
        limit = STARTUP
        try:
            while (message := child.next(min(limit, deadline - time.monotonic()))) is not None:
                if "begins" in message:
                    running = {"group": message["group"], "name": message["begins"]}
                    limit = case_limit
                else:
                    rows.append(message)
                    running, limit = None, STARTUP
            status = child.end()
        except TimeoutError as error:
            os.killpg(child.process.pid, signal.SIGKILL)
            child.end()
            if time.monotonic() >= deadline - 0.01:
                name = running["name"] if running else "the rest"
                rows.append({"name": name, "left_out": "no time left, for this and the rest"})
                return list(rows)
            if running is None:
                rows.append({"name": "start", "ok": False, "error": str(error)})
                return list(rows)
            rows.append({**running, "ok": False, "error": f"{error}: killed"})
            continue
        if status == 0:
            return list(rows)
        if running is not None:
            words = " | ".join(child.errors[-5:])
            rows.append({**running, "ok": False, "error": f"ended with status {status}: {words}"})
        elif len(rows) == len(done):
            words = " | ".join(child.errors[-5:])
            rows.append({"name": "start", "ok": False, "error": f"status {status}: {words}"})
            return list(rows)


class _Rows(list[Row]):
    """Rows that are told of as they are added."""

    def __init__(self, tell: Callable[[Row], None]) -> None:
        super().__init__()
        self.tell = tell

    def append(self, row: Row) -> None:
        super().append(row)
        self.tell(row)


def run_build(command: list[str], limit: float) -> tuple[int, str]:
    """Exit status and output of a build, which is ended with all its compilers after `limit` s."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return 124, f"not done within {limit:.0f} s"
    return process.returncode, output


def run_sanitizer(tool: str, limit: float) -> Row:
    """compute-sanitizer's `tool` over the small cases."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "86", sys.executable]
    command += ["-m", "benchmarks.gpu_worker", "sanitize"]
    # Each tensor an allocation of its own: else reads beyond one end in another, unnoticed.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(limit, 1.0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"name": tool, "left_out": f"not done within {limit:.0f} s"}
    row: Row = {"name": tool, "took": round(time.monotonic() - start, 1)}
    if "Device not supported" in output:
        return {**row, "left_out": "compute-sanitizer does not support this device"}
    told = [x for x in output.splitlines() if x.startswith("=========")]
    row["summary"] = told[-1].strip("= ") if told else output[-500:]
    row["ok"] = process.returncode == 0
    if not row["ok"]:
        row["error"] = "\n".join(told[:40]) or output[-2000:]
    return row
