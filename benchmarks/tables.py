"""Writes docs/results.md from the JSON in benchmarks/results: `python -m benchmarks.tables`."""

from __future__ import annotations

import statistics

from benchmarks import goals
from benchmarks.table_format import HERE, load, machine_line, table
from benchmarks.tables_scaling import scaling
from benchmarks.tables_subgraph import subgraph
from benchmarks.tables_training import calibration_cost, training
from benchmarks.tables_whole_graph import whole_graph

PAGE = HERE.parent / "docs" / "results.md"
HEAD = """# Results

Made by `python -m benchmarks.tables` from `benchmarks/results/`; don't edit by hand. Every number
is a ratio of times taken in one run, in turns, on one machine, over PyTorch's SDPA: the median over
the rounds. Larger is faster, and below 1 is slower than SDPA.
"""

BREAK_EVEN = """\
Where `own` is below 1, SDPA is faster: below 64 keys dense attention runs SDPA. Where `own
blasst` is below `own`, skipping does not pay: below 256 keys the default runs dense (`min_length`).
What is low is at most what can be skipped: the first block and the diagonal ones never are."""

GOALS_INTRO = """\
Set before the kernel was written, on an AMD Zen 4 (AVX-512 executed in halves), where they had been
reached by a prototype. What was measured is the range over the lengths and head sizes that the goal
covers, or the best of several settings where the goal asks for one that exists."""

LEGEND = """\
`own` is the native kernel that never skips; `own blasst` runs lambda 1e-3 on synthetic keys of
which the named share of 64-key blocks lies far below the others. SDPA in decode uses `enable_gqa`;
`sdpa_folded` has the GQA group folded into the query length."""

READING = """\
What has to be read at least (K and V; or K and the kept V; or the int8 copy and the kept K and V)
over the time. `bare read` adds up all of K and V and does nothing else: what memory gives one
thread, and, in wall time at the highest sparsity, what it has left for a second one."""


def attention() -> list[str]:
    """The attention call alone."""
    lines = ["", "## Attention alone", "", LEGEND]
    for phase in ("prefill", "decode"):
        data = load(f"{phase}.json")
        cases = data["cases"]
        names = list(dict.fromkeys(n for c in cases for n in c["seconds"] if n != "sdpa"))
        rows = []
        for case in cases:
            over = case["speedup_over"]["sdpa"]
            cells = [f"{over[n]['median']:.2f}" if n in over else "" for n in names]
            threads = f"{case['threads']} thread" + "s" * (case["threads"] > 1)
            rows.append([f"{case['name'].removeprefix(phase + ' torch.')}, {threads}", *cells])
        lines += ["", f"### {phase.capitalize()}", "", machine_line(data)]
        builds = {case["kernel"]: case["time"] for case in cases if "kernel" in case}
        if len(builds) > 1:
            told = " and ".join(f"{name[-12:]} ({time})" for name, time in builds.items())
            lines += ["", f"Cases of several builds of the kernel: {told}."]
        lines += ["", *table([phase, *names], rows)]
    return lines


def reached() -> list[str]:
    """The goals, and how far the results below come."""
    names = ("prefill", "decode", "scaling", "model_attention", "end_to_end")
    rows, misses = goals.rows({name: load(f"{name}.json") for name in names})
    head = ["goal", "dtype", "asked", "measured", ""]
    why = ["", "Why missed:", "", *misses] if misses else []
    return [
        "",
        "## Goals",
        "",
        GOALS_INTRO,
        "",
        *table(head, rows),
        *why,
    ]


def decode_reading() -> list[str]:
    """How fast decode reads what it has to, on one thread and on two, and what the copy costs."""
    data = load("decode.json")
    cases = [case for case in data["cases"] if case["length"] >= 32768]
    names = [name for name in cases[0]["needed_gb_per_s"] if name != "eager"]
    rates = [
        [
            case["name"].removeprefix("decode torch."),
            *(f"{case['needed_gb_per_s'][name]:.1f}" for name in names),
        ]
        for case in cases
    ]
    threads = [
        [row["dtype"][6:], *(f"{row['speedup'][name]:.2f}" for name in row["speedup"])]
        for row in data["two_threads"]
    ]
    costs = []
    for row in data["append"]:
        case = next(case for case in cases if case["dtype"] == row["dtype"])
        k, copy = case["bytes"]["k"], case["bytes"]["int8_copy"]
        costs.append(
            f"- The copy of a {row['dtype'][6:]} K of {k / 1e6:.1f} MB: {copy / 1e6:.1f} MB "
            f"({copy / k:.0%}; {copy / 2 / k:.0%} of K and V). The whole prompt enters it in "
            f"{row['prompt_seconds'] * 1e3:.0f} ms, then each token in "
            f"{row['token_seconds'] * 1e6:.0f} us."
        )
    return [
        "",
        "### Decode beside a bare read of K and V",
        "",
        READING,
        "",
        *table(["GB/s, one thread", *names], rates),
        "",
        *table(["two threads over one", *data["two_threads"][0]["speedup"]], threads),
        "",
        *costs,
    ]


def end_to_end() -> list[str]:
    """The whole model."""
    data = load("end_to_end.json")
    rows = [
        [
            row["dtype"].removeprefix("torch."),
            row["name"],
            f"{statistics.median(row['seconds']):.2f} s",
            f"{row['speedup_over_sdpa']:.2f}",
            f"{row['sparsity']:.1%}",
            f"{row['perplexity_ratio']:.4f}",
        ]
        for row in data["rows"]
    ]
    head = ["dtype", "attention", "first token", "over sdpa", "sparsity", "perplexity ratio"]
    length = data["rows"][0]["length"]
    title = f"## {data['model']}, {length} tokens of prose, {data['threads']} threads"
    shares = ", ".join(
        f"{row['attention_share']:.0%} ({row['dtype'].removeprefix('torch.')})"
        for row in data["rows"]
        if "attention_share" in row
    )
    note = ["", f"Attention's share of the time to first token with sdpa: {shares}."]
    return ["", title, "", machine_line(data), "", *table(head, rows), *(note if shares else [])]


def model_attention() -> list[str]:
    """The model's own queries, keys and values."""
    data = load("model_attention.json")
    rows = [
        [
            row["dtype"].removeprefix("torch."),
            row["name"],
            f"{row['speedup_over_sdpa']['median']:.2f}",
            f"{row['mean_sparsity']:.1%}",
            f"{row['mean_error']:.4f}",
            f"{row['worst_error']:.4f}",
        ]
        for row in data["rows"]
    ]
    head = ["dtype", "attention", "over sdpa", "sparsity", "error, mean", "error, worst layer"]
    layers = ", ".join(map(str, data["layers"]))
    return [
        "",
        f"## Attention alone, on {data['model']}'s own Q, K and V",
        "",
        f"{data['length']} tokens of {data['text']}, layers {layers}, {data['threads']} thread.",
        "The error of an output is |out - exact| / |exact|.",
        machine_line(data),
        "",
        *table(head, rows),
    ]


def break_even() -> list[str]:
    """Short lengths."""
    data = load("break_even.json")
    names = [n for n in data["cases"][0]["seconds"] if n != "sdpa"]
    rows = []
    for case in data["cases"]:
        over = case["speedup_over"]["sdpa"]
        dtype = case["dtype"].removeprefix("torch.")
        shape = f"{case['query_heads']}/{case['kv_heads']} heads D={case['head_size']}"
        label = f"{case['phase']} {dtype} {shape}, {case['length']} keys"
        rows.append([label, *(f"{over[name]['median']:.2f}" for name in names)])
    return [
        "",
        "## Break-even: short lengths, one thread",
        "",
        BREAK_EVEN,
        "",
        machine_line(data),
        "",
        *table(["call", *names], rows),
    ]


NEVER_RUN = """
## What has never run

- A real aarch64 machine. The build takes the portable path with NEON vectors. Where Debian's
  `g++-aarch64-linux-gnu` and `qemu-user` are installed, a test compiles every unit without a
  warning and checks the forward's output under emulation against float64 (done here, with g++
  12.2); the backward has only been compiled.
- A processor with AMX. The level `avx512_amx`, which runs only where it is asked for by name,
  multiplies on tiles in prefill with bfloat16 and even head sizes; all else in it (decode, which
  waits for memory; the backward; calibration's pass) is `avx512_bf16`. The int8 filter is left out:
  at the rates Intel states, tiles score keys sooner. A test runs its source on emulated tiles,
  which follow Intel's manual down to the order of the sums, against float64, and looks through its
  machine code; detection is tested against what processors and Linux may answer. Nothing is known
  of its speed.
- AVX2 and AVX-512 without BF16 on machines that have no more. They are tested here, forward and
  backward, by forcing the level (`HF_SPARSE_ATTENTION_CPU_LEVEL`); their speed is not measured."""


def main() -> None:
    """Writes the page."""
    parts = [
        reached(),
        end_to_end(),
        whole_graph(),
        subgraph(),
        model_attention(),
        attention(),
        decode_reading(),
        scaling(),
        training(),
        calibration_cost(),
        break_even(),
    ]
    lines = [HEAD.rstrip(), *(line for part in parts for line in part), NEVER_RUN]
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
