"""Times of our backends for GPUs and of their peers on this device, taken in turns.

A contestant is warmed up (which compiles it), its output is compared with the first peer's, and
only then timed: in each round everyone runs once, behind a flush of the L2 cache. Reported is the
median over the rounds.
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import gpu_inputs
from benchmarks.gpu_correctness import Case
from hf_sparse_attention.backends import BACKENDS
from hf_sparse_attention.functional import attend
from hf_sparse_attention.types import AttentionCall, BlockGeometry, SkipRule

OURS = ("triton", "cuda")
EMULATED = os.environ.get("TRITON_INTERPRET", "") == "1"
HEADS, KV_HEADS, SIZE = (2, 1, 16) if EMULATED else (32, 8, 128)
SCALE = SIZE**-0.5
SPARSITIES = (0.0, 0.9) if EMULATED else (0.0, 0.5, 0.75, 0.9)
Run = Callable[[], Tensor]
Inputs = tuple[Tensor, Tensor, Tensor]


def prefill_cases(device: str) -> list[Case]:
    lengths = [70] if EMULATED else [65536, 8192, 16384, 32768, 131072]
    return [(f"prefill {n}", lambda n=n: prefill(device, n)) for n in lengths]


def decode_cases(device: str) -> list[Case]:
    shapes = [(1, 65536), (8, 65536), (1, 8192), (32, 8192), (64, 8192), (32, 32768), (1, 131072)]
    if EMULATED:
        shapes = [(1, 200)]
    return [(f"decode {b} x {n}", lambda b=b, n=n: decode(device, b, n)) for b, n in shapes]


def backward_cases(device: str) -> list[Case]:
    lengths = [70] if EMULATED else [8192, 32768]
    return [(f"training {n}", lambda n=n: training(device, n)) for n in lengths]


def prefill(device: str, length: int) -> dict[str, Any]:
    """Causal, batch 1, bfloat16: seconds and TFLOP/s (of dense attention) by contestant."""
    made = {s: inputs(device, 1, length, length, s) for s in SPARSITIES}
    runs: dict[str, Run] = peers(*made[0.0], causal=True)
    sparsity = {}
    for s, qkv in made.items():
        for geometry in (BlockGeometry(64, 64), BlockGeometry(64, 128)):
            for backend in ours():
                name = f"{backend} {geometry.name}, {s:.0%} low"
                runs[name] = own(*qkv, geometry, backend)
                sparsity[name] = measured_sparsity(*qkv, geometry, backend)
    for backend in ours():
        runs[f"{backend} 64x64, no rule"] = own(
            *made[0.0], BlockGeometry(), backend, SkipRule.never()
        )
    flops = 2 * HEADS * length**2 * SIZE * 2 / 2
    return measure(runs, sparsity, flops=flops)


def decode(device: str, batch: int, kv_len: int) -> dict[str, Any]:
    """One query a request, each contestant as a replayed CUDA graph: seconds and GB/s of dense."""
    needed = len(SPARSITIES) * 2 * batch * KV_HEADS * kv_len * SIZE * 2
    if device == "cuda" and needed > 0.8 * torch.cuda.mem_get_info()[0]:
        return {"left_out": f"needs {needed / 2**30:.0f} GiB of memory"}
    made = {s: inputs(device, batch, 1, kv_len, s) for s in SPARSITIES}
    runs: dict[str, Run] = peers(*made[0.0], causal=False)
    sparsity = {}
    for s, qkv in made.items():
        for backend in ours():
            name = f"{backend} 64x64, {s:.0%} low"
            runs[name] = own(*qkv, BlockGeometry(), backend)
            sparsity[name] = measured_sparsity(*qkv, BlockGeometry(), backend)
    size = 2 * batch * KV_HEADS * kv_len * SIZE * 2
    return measure(runs, sparsity, size=size, graphs=device == "cuda")


def training(device: str, length: int) -> dict[str, Any]:
    """Forward and backward, causal, batch 1."""
    made = {s: inputs(device, 1, length, length, s) for s in (0.0, 0.75)}
    runs: dict[str, Run] = {}
    for name, run in peers(*made[0.0], causal=True, leaves=True).items():
        runs[name] = with_backward(run, made[0.0])
    sparsity = {}
    for s, qkv in made.items():
        name = f"triton 64x64, {s:.0%} low"
        leaves = tuple(x.detach().requires_grad_() for x in qkv)
        runs[name] = with_backward(own(*leaves, BlockGeometry(), "triton"), leaves)
        sparsity[name] = measured_sparsity(*qkv, BlockGeometry(), "triton")
    flops = 3.5 * 2 * HEADS * length**2 * SIZE * 2 / 2
    return measure(runs, sparsity, flops=flops)


def inputs(device: str, batch: int, q_len: int, kv_len: int, sparsity: float) -> Inputs:
    return gpu_inputs.make(
        batch, HEADS, KV_HEADS, q_len, kv_len, SIZE, sparsity=sparsity, device=device
    )


def rule_for(q: Tensor) -> SkipRule:
    log_lambda = math.log(gpu_inputs.LAMBDA)
    return SkipRule(log_lambda=torch.full((1, 1), log_lambda, device=q.device))


def ours() -> list[str]:
    """Our backends that can be timed here."""
    return [name for name in OURS if BACKENDS[name].available() is None]


def own(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: BlockGeometry,
    backend: str,
    rule: SkipRule | None = None,
) -> Run:
    call = AttentionCall(q, k, v, scale=SCALE)
    rule = rule_for(q) if rule is None else rule
    return lambda: attend(call, rule, geometry, backend).out.transpose(1, 2)


def measured_sparsity(
    q: Tensor, k: Tensor, v: Tensor, geometry: BlockGeometry, backend: str
) -> float:
    with torch.no_grad():
        result = attend(AttentionCall(q, k, v, scale=SCALE), rule_for(q), geometry, backend)
    visited, skipped = result.counts.sum((0, 1)).tolist()
    return skipped / visited


def peers(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, leaves: bool = False) -> dict[str, Run]:
    """Dense attention as others compute it; one that cannot is left out when it is warmed up."""
    if leaves:
        q, k, v = (x.requires_grad_() for x in (q, k, v))

    def sdpa(backend: SDPBackend) -> Run:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(
                    q, k, v, is_causal=causal, scale=SCALE, enable_gqa=True
                )

        return run

    if q.device.type == "cpu":
        return {"sdpa": sdpa(SDPBackend.MATH)}
    found = {
        "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "sdpa cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    }
    if not causal:
        folded = q.reshape(q.shape[0], KV_HEADS, HEADS // KV_HEADS, SIZE)

        def run_folded() -> Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                out = scaled_dot_product_attention(folded, k, v, scale=SCALE)
            return out.reshape(q.shape)

        found["sdpa flash, group folded"] = run_folded
    found["flex"] = flex(q, k, v, causal)
    return found


def flex(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Run:
    """FlexAttention, compiled; causality as a block mask."""
    made: list[Any] = []

    def run() -> Tensor:
        if not made:  # so that a failure here leaves out this contestant alone
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            mask = None
            if causal:
                mask = create_block_mask(
                    lambda _b, _h, i, j: i >= j, None, None, q.shape[2], k.shape[2], _compile=True
                )
            made.extend((torch.compile(flex_attention, dynamic=False), mask))
        compiled, mask = made
        return compiled(q, k, v, block_mask=mask, scale=SCALE, enable_gqa=True)

    return run


def with_backward(run: Run, leaves: Inputs) -> Run:
    dout: list[Tensor] = []

    def both() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        out = run()
        if not dout:
            dout.append(torch.randn_like(out))
        out.backward(dout[0])
        return out

    return both


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
