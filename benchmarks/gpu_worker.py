"""Runs the cases of `gpu_check.py`, one JSON line before and one after each: the check's child.

    python -m benchmarks.gpu_worker GROUP ... [--device cuda|cpu] [--most N] [--done NAME ...]

It ends after the first case that fails: a fault on a GPU spoils the process. The parent starts it
again for the cases that are left.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
from typing import Any


def faulty_cases(_: str) -> list[Any]:
    """What the parent must survive; for its tests."""
    return [
        ("raises", lambda: 1 // 0),
        ("crashes", os.abort),
        ("hangs", lambda: time.sleep(600)),
        ("works", dict),
    ]


#: Where the cases of a group come from: a function from the device to (name, function) pairs.
GROUPS = {
    "small": "benchmarks.gpu_correctness:small_cases",
    "large": "benchmarks.gpu_correctness:large_cases",
    "small_cuda": "benchmarks.gpu_correctness:small_cuda_cases",
    "small_sm80": "benchmarks.gpu_correctness:small_sm80_cases",
    "small_sm90": "benchmarks.gpu_hopper:small_cases",
    "large_cuda": "benchmarks.gpu_correctness:large_cuda_cases",
    "sanitize": "benchmarks.gpu_correctness:sanitize_cases",
    "int8": "benchmarks.gpu_int8:small_cases",
    "headlines": "benchmarks.gpu_timing:headline_cases",
    "prefill": "benchmarks.gpu_timing:prefill_cases",
    "decode": "benchmarks.gpu_timing:decode_cases",
    "int8_decode": "benchmarks.gpu_int8:decode_cases",
    "training": "benchmarks.gpu_timing:training_cases",
    "captured": "benchmarks.gpu_captured:cases",
    "faulty": "benchmarks.gpu_worker:faulty_cases",
}


def cases_of(group: str, device: str) -> list[Any]:
    """The cases of a group; imports what they need."""
    module, _, function = GROUPS[group].partition(":")
    found: list[Any] = getattr(importlib.import_module(module), function)(device)
    return found


def synchronize(device: str) -> None:
    """Waits for the GPU: a fault shows only then."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="+", choices=GROUPS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--done", nargs="*", default=[])
    parser.add_argument("--most", type=int, help="run only this many cases of a group")
    args = parser.parse_args()
    cases = [(g, *case) for g in args.groups for case in cases_of(g, args.device)[: args.most]]
    done = set(args.done)
    for group, name, run in cases:
        if name in done:  # before, or in an earlier group
            continue
        done.add(name)
        print(json.dumps({"begins": name, "group": group}), flush=True)
        start = time.perf_counter()
        try:
            found = {"ok": True, **run()}
            synchronize(args.device)
        except Exception as error:
            text = str(error).strip() or repr(error)
            found = {"ok": False, "error": f"{type(error).__name__}: {text[:600]}"}
        took = round(time.perf_counter() - start, 3)
        print(json.dumps({"group": group, "name": name, "took": took, **found}), flush=True)
        if not found["ok"]:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
