"""A whole model on the CPU: time to first token and decode rate, against what a user would pick.

    python -m benchmarks.whole_graph [--rounds 2] [--peers PYTHON --exports FOLDER]

SmolLM2-135M-Instruct reads 8064 tokens of the bundled book and writes 32 more. The contestants take
turns, each in a process of its own; what is reported are medians over the rounds of each round's
ratio to transformers' eager sdpa. Each result is written as soon as it is there, and a run that is
started again goes on where it was: delete the file to start anew. PYTHON is an interpreter with
OpenVINO and ONNX Runtime (`whole_graph_peers.py` says how to make one).

The gate: perplexity of the prompt within a tenth of sdpa's in float32, and a first token that is
among the ten likeliest of sdpa in float32 (in bfloat16 it need not be the very first).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from benchmarks.cpu_attention import machine
from benchmarks.whole_graph_peers import PEERS
from examples.demo_model import smollm2
from hf_sparse_attention import SparseAttentionConfig, optimize_for_cpu, set_sparse_attention
from hf_sparse_attention.storage import write_atomically
from hf_sparse_attention.types import BlockGeometry

HERE = Path(__file__).parent
BOOK = HERE.parent / "calibration_data" / "alice_in_wonderland.txt"
PROMPT, NEW = 8064, 32
#: What the others are compared with; the first is also what they must agree with.
BASES = ("sdpa float32", "sdpa bfloat16")
#: Contestants of this process's kind: dtype of the checkpoint, and what is done to it. `{dtype}`
#: after "optimized" is what is asked of optimize_for_cpu.
OWN: dict[str, tuple[str, str]] = {
    BASES[0]: ("float32", "sdpa"),
    BASES[1]: ("bfloat16", "sdpa"),
    "optimize_for_cpu bf16": ("bfloat16", "optimized bf16"),
    "optimize_for_cpu bf16, skipping": ("bfloat16", "skipping optimized bf16"),
    "optimize_for_cpu int8": ("bfloat16", "optimized int8"),
    "ours, eager bfloat16": ("bfloat16", "ours"),
    "optimize_for_cpu fp32": ("float32", "optimized fp32"),
    "sdpa float32, torch.compile": ("float32", "compiled"),
    "sdpa bfloat16, torch.compile": ("bfloat16", "compiled"),
}
#: Where skipping is asked for: BLASST on single keys, in prefill; in decode the default budget.
SKIPPING_LAMBDA, SKIPPING_GEOMETRY = 0.01, "64x1"


def prompt() -> list[int]:
    """Token ids of the book's beginning."""
    ids: list[int] = AutoTokenizer.from_pretrained(smollm2())(BOOK.read_text()).input_ids
    return ids[1000 : 1000 + PROMPT]


def prepared(dtype: str, way: str) -> tuple[Any, dict[str, Any]]:
    """The model as a contestant has it, and what is to be told of it."""
    folder = smollm2()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    about: dict[str, Any] = {}
    if way == "ours":
        set_sparse_attention(model, "blasst")
    if way.startswith("skipping"):
        config = SparseAttentionConfig(
            geometry=BlockGeometry.from_name(SKIPPING_GEOMETRY),
            threshold_scale_factor={"prefill": {"a": SKIPPING_LAMBDA * PROMPT, "b": 0.0}},
        )
        set_sparse_attention(model, config)
    if "optimized" in way:
        result = optimize_for_cpu(
            model, way.split()[-1], tokenizer=str(folder), progress=False, new_tokens=128
        )
        about["optimization"] = result.to_dict()
    if way == "compiled":
        start = time.perf_counter()
        model = torch.compile(model, dynamic=True)
        answer(model, list(range(100, 300)), 3)
        about["compile_seconds"] = time.perf_counter() - start
    return model, about


def answer(model: Any, ids: list[int], new: int) -> tuple[float, float, list[int]]:
    """Seconds to the first token, then for each of the others; and the tokens."""
    start = time.perf_counter()
    cache = DynamicCache(config=model.config)
    out = model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    tokens = [out.logits[:, -1:].argmax(-1)]
    tokens[0].item()
    first = time.perf_counter()
    for _ in range(new - 1):
        out = model(tokens[-1], past_key_values=cache, use_cache=True)
        tokens.append(out.logits[:, -1:].argmax(-1))
    end = time.perf_counter()
    return first - start, (end - first) / (new - 1), [int(token) for token in tokens]


def perplexity(model: Any, ids: list[int]) -> float:
    """Of the prompt's tokens after the first."""
    hidden = model.model(torch.tensor([ids]), use_cache=False).last_hidden_state
    labels = torch.tensor(ids[1:])
    losses = [
        cross_entropy(model.lm_head(states).float(), right, reduction="sum").item()
        for states, right in zip(hidden[0, :-1].split(512), labels.split(512), strict=True)
    ]
    return math.exp(sum(losses) / len(labels))


@torch.no_grad()
def run_own(name: str, measure_perplexity: bool) -> dict[str, Any]:
    """One contestant, in this process."""
    dtype, way = OWN[name]
    ids = prompt()
    model, about = prepared(dtype, way)
    answer(model, ids[:64], 2)
    prefill, decode, tokens = answer(model, ids, NEW)
    about |= {"prefill": prefill, "decode": decode, "tokens": tokens}
    if name == BASES[0] and measure_perplexity:
        last = model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1]
        about["likeliest"] = last.topk(10).indices.tolist()
    if measure_perplexity and way != "compiled":
        about["perplexity"] = perplexity(model, ids)
    return about


def child(command: list[str]) -> dict[str, Any] | str:
    """What a child measured, or why it failed."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1][:300]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(name: str, number: int, args: argparse.Namespace, ids: Path) -> dict[str, Any] | str:
    """One contestant in one round."""
    if name in OWN:
        options = ["--perplexity"] if number == 0 else []
        return child([sys.executable, "-m", "benchmarks.whole_graph", "--child", name, *options])
    if args.peers is None:
        return "no interpreter that has it was named (--peers)"
    script, threads = str(HERE / "whole_graph_peers.py"), str(torch.get_num_threads())
    told = [name, str(args.exports), str(ids), str(NEW), threads]
    return child([args.peers, script, "run", *told])


def summary(runs: dict[str, list[dict[str, Any] | str]]) -> list[dict[str, Any]]:
    """A row for each contestant: medians, ratios to the bases of the same round, the gate."""
    rows: list[dict[str, Any]] = []
    for name, each in runs.items():
        done = [run for run in each if isinstance(run, dict)]
        if not done:
            rows.append({"name": name, "reason": each[0] if each else "not run"})
            continue
        row: dict[str, Any] = {"name": name, "rounds": len(done)}
        for phase in ("prefill", "decode"):
            row[phase] = statistics.median(run[phase] for run in done)
            row[f"{phase}_over"] = {base: _ratio(runs[base], each, phase) for base in BASES}
        exact = runs[BASES[0]][0]
        assert isinstance(exact, dict), exact
        first = done[0]["tokens"][0]
        assert first in exact["likeliest"], f"{name}: begins with {first}"
        if "perplexity" in done[0]:
            row["perplexity_ratio"] = done[0]["perplexity"] / exact["perplexity"]
            assert abs(row["perplexity_ratio"] - 1) < 0.1, f"{name}: {row}"
        rows.append(row)
    return rows


def _ratio(base: list[Any], runs: list[Any], phase: str) -> float | None:
    """The median over the rounds that both have."""
    pairs = [
        (a[phase], b[phase])
        for a, b in zip(base, runs, strict=False)
        if isinstance(a, dict) and isinstance(b, dict)
    ]
    return statistics.median(a / b for a, b in pairs) if pairs else None


def main() -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peers", help="a Python interpreter with OpenVINO and ONNX Runtime")
    parser.add_argument("--exports", type=Path, default=Path(tempfile.gettempdir()) / "exports")
    parser.add_argument("--only", nargs="+", help="contestants; the others' results are kept")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "whole_graph.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--perplexity", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run_own(args.child, args.perplexity)))
        return
    if args.peers is not None:
        script = str(HERE / "whole_graph_peers.py")
        subprocess.run(
            [args.peers, script, "export", str(smollm2()), str(args.exports)], check=True
        )
    data = json.loads(args.output.read_text()) if args.output.exists() else {}
    about = {"model": "SmolLM2-135M-Instruct", "prompt": PROMPT, "new_tokens": NEW}
    threads = torch.get_num_threads()  # looking at the machine changes it
    here = machine()
    stamp = {key: here[key] for key in ("kernel", "time")}
    data = {"machine": here, "threads": threads, **about, **data}
    torch.set_num_threads(threads)
    runs = data.setdefault("runs", {name: [] for name in (*OWN, *PEERS)})
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(prompt(), file)
        file.flush()
        for number in range(args.rounds):
            for name, each in runs.items():
                if len(each) > number or (args.only and name not in args.only):
                    continue
                found = measure(name, number, args, Path(file.name))
                each.append(found | stamp if isinstance(found, dict) else found)
                print(number, name, str(each[-1])[:160], flush=True)
                write_atomically(args.output, (json.dumps(data, indent=1) + "\n").encode())
    data["rows"] = summary(runs)  # may refuse them; they are kept all the same
    write_atomically(args.output, (json.dumps(data, indent=1) + "\n").encode())
    for row in data["rows"]:
        print(row)


if __name__ == "__main__":
    main()
