"""The part of docs/results.md on growth, memory, the share of the peak and two threads."""

from __future__ import annotations

import statistics

from benchmarks.table_format import load, machine_line, table

MISSING = """\
Not measured on this kernel yet: `python -m benchmarks.scaling`, on a machine with nothing else to
do."""

CONTROLS = {
    "own": "own",
    "multiply_adds": "multiply-adds alone",
    "reading": "reading memory alone",
    "cpu_time": "CPU time, two threads' over one's",
}
TWO_THREADS = """\
The controls are taken in the same rounds: what the machine itself wins with its second core. Where
CPU time grows, the cores wait for memory or are slower together; they are not idle: speedup times
growth is the number of cores at work."""


def scaling() -> list[str]:
    """Growth with the length, memory, threads, share of the peak."""
    data = load("scaling.json")
    if not data:
        return ["", "## Growth, memory, two threads, share of the peak", "", MISSING]
    names = [n for n in data["growth"][0]["seconds"] if n != "sdpa"]
    growth = [
        [
            "{}, {} tokens, {} heads".format(case["dtype"][6:], case["length"], case["heads"]),
            f"{statistics.median(case['seconds']['sdpa']):.3f} s",
            *(f"{case['speedup_over']['sdpa'][name]['median']:.2f}" for name in names),
            f"{case['gflops_dense']:.0f}",
        ]
        for case in data["growth"]
    ]
    memory = [
        [row["dtype"], row["name"], str(row["length"]), f"{row['kib'] / 1024:.1f}"]
        for row in data["memory"]
    ]
    parts = [
        f"{name.replace('_', ' ')} {made['time'][:16]} with kernel {made['kernel'][-12:]}"
        for name, made in data["parts"].items()
    ]
    share = [
        [
            row["dtype"].removeprefix("torch."),
            str(row["head_size"]),
            f"{row['gflops']:.0f}",
            f"{row['share']:.0%}",
        ]
        for row in data["share_of_peak"]
    ]
    threads = [
        [
            f"{row['phase']} {row['dtype'].removeprefix('torch.')} D={row['head_size']}",
            *(f"{row['median'][name]:.2f}" for name in CONTROLS),
        ]
        for row in data["two_threads"]
    ]
    return [
        "",
        "## Growth with the length, one thread, head size 64",
        "",
        f"{data['low_blocks']:.0%} of the key blocks are low; fewer heads at long lengths keep a "
        "run within minutes. " + machine_line(data),
        "",
        "Measured: " + "; ".join(parts) + ".",
        "",
        *table(["prefill", "sdpa", *names, "own, GFLOP/s"], growth),
        "",
        "### Memory that one call of one head adds, its output included",
        "",
        *table(["dtype", "attention", "tokens", "MiB"], memory),
        "",
        "### Dense prefill at 4096 tokens against the peak of fused multiply-adds",
        "",
        *table(["dtype", "D", "GFLOP/s", "share"], share),
        "",
        "### Two threads over one, dense, wall time",
        "",
        TWO_THREADS,
        "",
        *table(["call", *CONTROLS.values()], threads),
    ]
