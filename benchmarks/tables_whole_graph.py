"""The part of docs/results.md on a whole model, against what a user would pick instead."""

from __future__ import annotations

from typing import Any

from benchmarks.table_format import load, machine_line, table

INTRO = """\
Each contestant in a process of its own; ratios are over transformers' eager sdpa, larger is faster.
What ran in three rounds stands as their median, the last two with the present kernel; what ran in
one came in two sittings, `optimize_for_cpu fp32`, `torch.compile` and OpenVINO in float32 in the
second: there take differences of a tenth for noise. optimize_for_cpu had its default
`prompt_length` of 1024: in float32 that left our attention out, which would have paid at this
length. `skipping` runs BLASST on single keys at lambda 0.01 in prefill; the
others of ours are not calibrated. OpenVINO and ONNX Runtime run exports of the same checkpoint, by
openvino-genai and onnxruntime-genai. `torch.compile` is eager sdpa compiled with `dynamic=True`;
compiling is not in its times. The perplexity is that of the prompt, over sdpa's in float32."""


def whole_graph() -> list[str]:
    """Time to first token and decode rate of everything that was run."""
    data = load("whole_graph.json")
    if not data:
        return []
    bases = list(next(row for row in data["rows"] if "prefill_over" in row)["prefill_over"])
    rows = [_cells(row, bases) for row in data["rows"] if "reason" not in row]
    head = ["", "rounds", "first token"]
    head += [f"over {base}" for base in bases]
    head += ["a token"]
    head += [f"over {base}" for base in bases]
    head += ["perplexity"]
    title = (
        f"## {data['model']} against other ways to run it: {data['prompt']} tokens in, "
        f"{data['new_tokens']} out, {data['threads']} threads"
    )
    missing = [f"- {row['name']}: {row['reason']}" for row in data["rows"] if "reason" in row]
    note = ["", "Not run:", "", *missing] if missing else []
    return ["", title, "", INTRO, "", machine_line(data), "", *table(head, rows), *note]


def _cells(row: dict[str, Any], bases: list[str]) -> list[str]:
    over = {
        phase: [_number(row[f"{phase}_over"][base]) for base in bases]
        for phase in ("prefill", "decode")
    }
    return [
        row["name"],
        str(row["rounds"]),
        f"{row['prefill']:.2f} s",
        *over["prefill"],
        f"{row['decode'] * 1e3:.0f} ms",
        *over["decode"],
        f"{row['perplexity_ratio']:.4f}" if "perplexity_ratio" in row else "",
    ]


def _number(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"
