"""Evaluates one of the models that need no Hub: accuracy against sparsity against time.

    python -m benchmarks.evaluation smollm2 [--lengths 2048,4096,8192] [--samples 2048=20,8192=2]
    python -m benchmarks.evaluation_tables

What `hf-sparse-attention evaluate` does, on smollm2, gemma3 or retrieval, with the plan of this
file. The result goes to benchmarks/results/evaluation_<model>.json. A run that was cut off (by
`timeout`, say) continues where it was: what has been measured is kept in .cache/evaluation. With
`--out benchmarks/results/evaluation_<name>.json` a model may have several, such as one a length.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch

from benchmarks.evaluation_models import MODELS, NAMES
from benchmarks.table_format import HERE
from hf_sparse_attention.evaluation import evaluate
from hf_sparse_attention.evaluation.arguments import samples_by_length
from hf_sparse_attention.evaluation.store import RESULT

WORK = HERE.parent / ".cache" / "evaluation"
SETTINGS = (
    *("dense", "never", "blasst:0.3", "blasst:0.5", "blasst:0.7", "blasst:0.5:head"),
    *("blasst:0.7:head", "bsfa:k=8", "bsfa:k=16", "budget:0.02", "budget:0.2"),
    *("window:0.5", "window:0.7"),
)
PLANS: dict[str, dict[str, Any]] = {
    "smollm2": {"samples": "2048=10,4096=4,8192=1"},
    "gemma3": {"samples": "2048=4,4096=2"},
    "retrieval": {"samples": "1024=40,2048=40", "texts": False},
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("model", choices=MODELS)
    arguments.add_argument("--samples", help="by length, as 2048=20,4096=8")
    arguments.add_argument("--tasks", help="some of them, as niah_single_1,vt")
    arguments.add_argument("--settings", default=",".join(SETTINGS))
    arguments.add_argument("--no-texts", action="store_true", help="no perplexity and KL")
    arguments.add_argument("--max-new-tokens", type=int, default=64)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--out", type=Path, help="instead of benchmarks/results")
    arguments.add_argument("--work", type=Path, default=WORK)
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    out = given.out or HERE / "results" / f"evaluation_{given.model}.json"
    work = given.work / out.stem
    plan = PLANS[given.model]
    samples = samples_by_length(given.samples or plan["samples"])
    model, tokenizer, tasks, config = MODELS[given.model](list(samples))
    evaluate(
        model,
        tokenizer,
        tasks=given.tasks.split(",") if given.tasks else tasks,
        lengths=list(samples),
        samples=samples,
        settings=given.settings.split(","),
        texts=plan.get("texts", True) and not given.no_texts,
        max_new_tokens=given.max_new_tokens,
        config=config,
        output_dir=work,
        resume=True,
        name=NAMES[given.model],
    )
    shutil.copyfile(work / RESULT, out)


if __name__ == "__main__":
    main()
