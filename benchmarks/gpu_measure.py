"""Times of contestants on this device, taken in turns.

A contestant is warmed up (which compiles it), its output is compared with the first one's, and only
then timed: in each round everyone runs once, behind a flush of the L2 cache. Reported is the median
over the rounds.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OURS = ("triton", "cuda")  # what the names of our contestants begin with
EMULATED = os.environ.get("TRITON_INTERPRET", "") == "1"
Run = Callable[[], Tensor]


def measure(
    runs: dict[str, Run],
    sparsity: dict[str, float],
    *,
    flops: float = 0.0,
    size: float = 0.0,
    graphs: bool = False,
) -> dict[str, Any]:
    """Rounds of everyone once, as many as fit into a few seconds; medians.

    Args:
        runs: by name; ours begin with the backend's; those on the peers' own inputs have
            "0% low", or no sparsity.
        sparsity: what was measured of ours.
        flops: of dense attention, or
        size: the bytes that dense attention reads.
        graphs: time replays of CUDA graphs.
    """
    unable: dict[str, str] = {}
    first: list[Tensor] = []
    for name, run in list(runs.items()):
        comparable = name not in sparsity or name.endswith(" 0% low")
        ready = warmed_up(run, first if comparable else [], graphs)
        if isinstance(ready, str):
            unable[name] = ready
            del runs[name]
        else:
            runs[name] = ready
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    one_round = 0.0 if EMULATED else sum(timed(run) for run in runs.values())
    rounds = 1 if EMULATED else max(3, min(30, int(2.5 / one_round)))
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(timed(runs[name]))
    seconds = {name: statistics.median(each) for name, each in times.items()}
    peer_times = [t for name, t in seconds.items() if not name.startswith(OURS)]
    best = min(peer_times, default=math.nan)
    rows = {}
    for name, t in seconds.items():
        row = {"seconds": t, "spread": max(times[name]) / min(times[name])}
        row |= {"speedup_over_best_peer": best / t}
        row |= {"tflops": flops / t / 1e12} if flops else {"gbytes_per_s": size / t / 1e9}
        row |= {"sparsity": sparsity[name]} if name in sparsity else {}
        rows[name] = row
    ours_ran = not any(name.startswith(OURS) for name in unable)
    return {"ok": ours_ran, "rounds": rounds, "contestants": rows, "unable": unable}


def warmed_up(run: Run, first: list[Tensor], graphs: bool) -> Run | str:
    """The run, or its CUDA graph, having been run once and compared; or why it cannot take part.

    Args:
        run: a contestant.
        first: the output of the first contestant; entered here if there is none.
        graphs: whether to make a CUDA graph of it.
    """
    try:
        out = run().detach().float()
        if first:
            # Two roundings to bfloat16 of one weighted mean of values.
            error = (out - first[0]).abs().max().item()
            allowed = 4 * torch.finfo(torch.bfloat16).eps * first[0].abs().max().item()
            assert error <= allowed, f"differs from the first contestant by {error:.2e}"
        else:
            first.append(out)
        return captured(run) if graphs else run
    except Exception as error:  # a peer that cannot is no failure of the check
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


_flush: list[Tensor] = []


def timed(run: Run) -> float:
    """Seconds of one run behind a flush of the L2 cache."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    if not _flush:
        _flush.append(torch.empty(256 << 20, dtype=torch.int8, device="cuda"))
    _flush[0].zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def captured(run: Run) -> Run:
    """The run as a CUDA graph, so that launches cost nothing: what serving engines do."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
