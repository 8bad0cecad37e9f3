"""The part of docs/results.md on what surrounds attention, and on short bidirectional attention."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.table_format import load, machine_line, table

INTRO = """\
One attention module of transformers, from Q, K and V's projections to the output's, with random
weights. `sdpa` is transformers' own in eager mode, `compiled` is `torch.compile` of the module
named before it, `fused` is `fuse_attention`; `skipping` is BLASST on keys that let it skip the
share named (64 x 64 blocks). Every contestant is about as close to float64 as sdpa is."""
GOALS = """\
Goals in bfloat16: at least 2 dense, and at least 3 at 75% skipped, over `sdpa` and over `sdpa
compiled`."""
DECODE = """\
A token behind 8192 others, attention dense. The cache is transformers' dynamic or static one, or
`GrowingCache`. How many times faster than sdpa on a dynamic cache, where it is slow with grouped
heads, and on a static one:"""
PIECES = """\
What a layer does around attention, as eager mode does it and otherwise; medians."""
PATTERN = """\
Bidirectional attention with a padding mask (half to all of the keys are valid), heads of 64: the
oneDNN Graph Compiler's pattern. `primitives` is matmul, scale and mask, softmax, matmul;
`inductor` is their `torch.compile`. How many times faster the kernel is (the goal is 2 over
primitives):"""


def subgraph() -> list[str]:
    """All of it."""
    data = load("attention_subgraph.json")
    if not data:
        return []
    lines = ["", "## A layer's attention, projections included", "", INTRO, "", machine_line(data)]
    parts = ("prefill", "decode", "pieces", "pattern")
    builds = {c["kernel"][-12:]: c["time"] for part in parts for c in data.get(part, [])}
    if len(builds) > 1:
        told = " and ".join(f"{name} ({time})" for name, time in builds.items())
        lines += ["", f"Cases of several builds of the kernel: {told}."]
    lines += _versus(data, "prefill", "sdpa", "### Prefill over sdpa", GOALS)
    lines += _versus(data, "prefill", "sdpa compiled", "### Prefill over sdpa compiled", "")
    lines += _versus(data, "decode", "sdpa, dynamic", "### Decode over sdpa, dynamic", DECODE)
    lines += _versus(data, "decode", "sdpa, static", "### Decode over sdpa, static", "")
    return [*lines, *_pieces(data), *_pattern(data)]


def _label(case: dict[str, Any]) -> str:
    plural = "s" * (case["threads"] > 1)
    return f"{case['shape']} {case['dtype']}, {case['threads']} thread{plural}"


def _versus(data: dict[str, Any], part: str, base: str, title: str, text: str) -> list[str]:
    cases = data.get(part, [])
    if not cases:
        return []
    names = [name for name in cases[0]["seconds"] if name != base]
    rows = []
    for case in cases:
        skipped = [f"{case['skipped']:.0%}"] if "skipped" in case else []
        over = case["speedup_over"][base]
        rows.append([_label(case), *skipped, *(f"{over[name]['median']:.2f}" for name in names)])
    head = [f"{cases[0]['length']} tokens", *(["skipped"] if part == "prefill" else []), *names]
    return ["", title, *(["", text] if text else []), "", *table(head, rows)]


def _pieces(data: dict[str, Any]) -> list[str]:
    rows = []
    for case in data.get("pieces", []):
        unit, factor = ("µs", 1e6) if case["length"] == 1 else ("ms", 1e3)
        tokens = "1 token" if case["length"] == 1 else f"{case['length']} tokens"
        for piece, ways in case["seconds"].items():
            shown = [
                f"{name} {statistics.median(times) * factor:.3g} {unit}"
                for name, times in ways.items()
            ]
            rows.append([_label(case), tokens, piece, "; ".join(shown)])
    if not rows:
        return []
    return ["", "### Piece by piece", "", PIECES, "", *table(["layer", "new", "piece", ""], rows)]


def _pattern(data: dict[str, Any]) -> list[str]:
    cases = data.get("pattern", [])
    if not cases:
        return []
    bases = list(cases[0]["speedup_over"])
    rows = [
        [
            _label(case),
            str(case["length"]),
            *(f"{case['speedup_over'][base]['own']['median']:.2f}" for base in bases),
        ]
        for case in cases
    ]
    head = ["call", "tokens", *(f"over {base}" for base in bases)]
    return ["", "## Short bidirectional attention", "", PATTERN, "", *table(head, rows)]
