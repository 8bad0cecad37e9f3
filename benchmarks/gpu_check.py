"""`make gpu-check`: the backends for GPUs on this machine's, proven right and then timed.

    python benchmarks/gpu_check.py [--seconds 540] [--time-anyway] [--emulate]

One command for a fresh machine: needs Python, torch, Triton and transformers, and no internet; the
CUDA variant also nvcc and g++, without which it alone is left out. It builds the variants, checks
small shapes against the float64 oracle of the tests and large ones against float64 on the device,
and that decode gives the same bits with an int8 copy of K; runs compute-sanitizer where there is
one, and times against SDPA (flash, cuDNN), FlexAttention and, where they are installed,
FlashAttention 2 and 3; on made inputs, and on SmolLM2's if they were carried along
(gpu_captured.py). In the end it says which goals are reached (gpu_goals.py). Everything on the GPU
runs in child processes, each case within a time limit: a hang or a fault costs its case and no
more. If something is wrong, nothing is timed (but with --time-anyway, which the result then says).

There is a deadline for the whole (--seconds), and, as shares of it, one for each part (PARTS); what
a part leaves is the next ones'. Cases that were not reached are left out, by name of the first; the
ones that matter most come first.

The result is gpu_check.json in the folder $OUT, else in benchmarks/results; it is written again
after every case. The exit status is 0 only if all that ran was right. `--emulate` runs tiny cases
on the CPU, interpreted: a rehearsal of this script, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_children import Row, run_build, run_cases, run_sanitizer  # noqa: E402
from benchmarks.gpu_goals import goals, print_goals  # noqa: E402

TOOLS = ("memcheck", "racecheck", "synccheck")
#: When each part ends at the latest, as a share of all seconds.
PARTS = {"build": 0.3, "correctness": 0.6, "sanitizer": 0.72, "timing": 0.98}


def last_line(*command: str) -> str | None:
    """The last line that a command prints, or None where it is missing, fails or is silent."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.strip().splitlines()
    return lines[-1] if done.returncode == 0 and lines else None


def provenance() -> dict[str, Any]:
    """Of what, and on what, the numbers are."""
    packages = ("torch", "triton", "transformers", "kernels", "numpy")
    installed = {x.name.lower(): x.version for x in metadata.distributions()}
    query = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    (built,) = ROOT.glob("kernel_hub/block-skip-attention/build/torch-universal/metadata.json")
    return {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": last_line("git", "rev-parse", "HEAD"),
        "changed": bool(last_line("git", "status", "--porcelain", "--untracked-files=no")),
        "kernel": json.loads(built.read_text())["id"],
        "gpu": last_line(*query),
        "nvcc": last_line("nvcc", "--version"),
        "python": platform.python_version(),
        "versions": {name: installed.get(name) for name in packages},
    }


def is_gpu_there() -> bool:
    code = "import torch; raise SystemExit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code]).returncode == 0


def build_cuda(builder: list[str], deadline: float, *, emulate: bool) -> dict[str, Any]:
    """Builds the CUDA variant: its id, or why there is none, and how long that took."""
    start = time.monotonic()
    what = ["--emulate"] if emulate else ["--variant", "cuda"]
    status, output = run_build([*builder, *what], max(deadline - start, 1.0))
    print(output, flush=True)
    took = round(time.monotonic() - start, 1)
    if status:
        return {"cuda": f"not built: {output[-2000:]}", "cuda_build_took": took}
    folder = ROOT / "kernel_hub/block-skip-attention"
    pattern = ".build/emulated" if emulate else "build/torch-stable-abi*-cu[0-9]*"
    built = max(folder.glob(f"{pattern}/metadata.json"), key=lambda path: path.stat().st_mtime)
    return {"cuda": json.loads(built.read_text())["id"], "cuda_build_took": took}


def check(
    result: dict[str, Any],
    deadlines: dict[str, float],
    path: Path,
    *,
    emulate: bool,
    time_anyway: bool,
) -> None:
    """All parts but the build, each adding its rows to `result` as they come."""
    options = ["--device", "cpu", "--most", "1"] if emulate else []

    def begin(part: str) -> Callable[[Row], None]:
        rows = result[part] = []

        def tell(row: Row) -> None:
            rows.append(row)
            write(result, path)
            print_row(row)

        return tell

    groups = ["small", "int8", "large"]
    if result["cuda"].startswith("_"):
        groups = ["small_cuda", "small_sm90", "small_sm80", "large_cuda", *groups]
    tell, deadline = begin("correctness"), deadlines["correctness"]
    run_cases(groups, options, case_limit=60, deadline=deadline, tell=tell)
    tell, deadline = begin("sanitizer"), deadlines["sanitizer"]
    for i, tool in enumerate(TOOLS):
        if emulate or shutil.which("compute-sanitizer") is None:
            reason = "emulated" if emulate else "compute-sanitizer is not installed"
            tell({"name": tool, "left_out": reason})
        else:
            share = (deadline - time.monotonic()) / (len(TOOLS) - i)
            tell(run_sanitizer(tool, limit=min(70.0, share)))
    result["timing_in_spite_of_errors"] = time_anyway and bool(wrong(result))
    if wrong(result) and not time_anyway:
        result["timing"] = "not taken: something is wrong"
        return
    groups = ["headlines", "captured", "int8_decode", "training", "prefill", "decode"]
    tell, deadline = begin("timing"), deadlines["timing"]
    run_cases(groups, options, case_limit=120, deadline=deadline, tell=tell)


def write(result: dict[str, Any], path: Path) -> None:
    """Writes what is known so far, as a whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    temporary.replace(path)


def wrong(result: dict[str, Any]) -> list[Row]:
    """The rows that are not right; what was not run is neither right nor wrong."""
    stages = [x for x in result.values() if isinstance(x, list)]
    return [row for rows in stages for row in rows if row.get("ok") is False]


def print_row(row: Row) -> None:
    if "left_out" in row:
        print(f"--    {row['name']}: {row['left_out']}")
        return
    shown = {n: x for n, x in row.items() if n not in ("ok", "name", "group", "contestants")}
    print("ok   " if row["ok"] else "WRONG", row["name"], json.dumps(shown), flush=True)


def print_times(rows: list[Row]) -> None:
    for row in rows:
        print(f"\n{row['name']}")
        for name, reason in row.get("unable", {}).items():
            print(f"  {name:26s} unable: {reason}")
        for name, x in row.get("contestants", {}).items():
            work = (x["tflops"], "TFLOP/s") if "tflops" in x else (x["gbytes_per_s"], "GB/s")
            share = f"{x['sparsity']:6.1%} skipped" if "sparsity" in x else ""
            print(
                f"  {name:26s}{x['seconds'] * 1e3:10.3f} ms{work[0]:8.0f} {work[1]:7s}"
                f"{x['speedup_over_best_peer']:7.2f} x  {share}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=540.0, help="for everything together")
    parser.add_argument("--emulate", action="store_true", help="tiny cases, on the CPU")
    parser.add_argument("--time-anyway", action="store_true", help="even if something is wrong")
    args = parser.parse_args()
    start = time.monotonic()
    deadlines = {part: start + share * args.seconds for part, share in PARTS.items()}
    if not args.emulate and not is_gpu_there():
        sys.exit("gpu-check: expected a CUDA device, found none; `make test` needs none")
    os.environ["TRITON_INTERPRET"] = "1" if args.emulate else "0"
    os.environ["HF_SPARSE_ATTENTION_EMULATE"] = "1" if args.emulate else "0"
    builder = [sys.executable, str(ROOT / "kernel_hub/build.py")]
    subprocess.run([*builder, "--variant", "universal"], check=True)
    built = build_cuda(builder, deadlines["build"], emulate=args.emulate)
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "gpu_check.json"
    result: dict[str, Any] = {"emulated": args.emulate, **provenance(), **built}
    check(result, deadlines, path, emulate=args.emulate, time_anyway=args.time_anyway)
    failed = wrong(result)
    result["right"] = not failed
    result["took"] = round(time.monotonic() - start, 1)
    if isinstance(result["timing"], list):
        result["goals"] = goals(result["timing"])
    write(result, path)
    if "goals" in result:
        print_times(result["timing"])
        print_goals(result["goals"])
    print(f"\n{len(failed)} wrong; wrote {path}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
