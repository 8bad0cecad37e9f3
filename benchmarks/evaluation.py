"""Evaluates the models that need no Hub: accuracy against sparsity against time.

    python -m benchmarks.evaluation                         # every plan, one after the other
    python -m benchmarks.evaluation retrieval gemma3        # some of them
    python -m benchmarks.evaluation smollm2_4096 --samples 4096=50
    python -m benchmarks.evaluation_tables

What `hf-sparse-attention evaluate` does, by the plans of this file; docs/evaluation-results.md has
how long each takes. The result goes to benchmarks/results/evaluation_<plan>.json. A run that was
cut off (by `timeout`, say) continues where it was, and one with more samples or tasks takes over
what is there: what has been measured is kept in .cache/evaluation.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.evaluation_models import MODELS, NAMES
from benchmarks.table_format import HERE
from hf_sparse_attention.evaluation import evaluate
from hf_sparse_attention.evaluation.arguments import samples_by_length
from hf_sparse_attention.evaluation.store import RESULT

WORK = HERE.parent / ".cache" / "evaluation"
_SETTINGS = (
    *("dense", "blasst:0.5", "blasst:0.7", "blasst:0.7:head", "bsfa:k=8", "budget:0.2"),
    "window:0.5",
)
_FEW_SETTINGS = ("dense", "blasst:0.5:head", "bsfa:k=8", "window:0.5")
_NEEDLES = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1")


@dataclass(frozen=True)
class Plan:
    """One run: a model of `MODELS`, and what it is asked.

    Args:
        model: its name.
        samples: of each task, by length.
        tasks: names of tasks; None: the model's own.
        settings: that are compared.
        max_new_tokens: of an answer, where its task would allow more.
        texts: perplexity and KL, too.
        geometry: the blocks; None: those that suit the machine best, single keys on a CPU.
    """

    model: str
    samples: Mapping[int, int]
    tasks: Sequence[str] | None = _NEEDLES
    settings: Sequence[str] = _SETTINGS
    max_new_tokens: int = 32
    texts: bool = False
    geometry: str | None = None


PLANS = {
    "smollm2": Plan(
        "smollm2",
        {2048: 16},
        (*_NEEDLES, "niah_multikey_2", "niah_multivalue"),
        max_new_tokens=64,
        texts=True,
    ),
    "smollm2_others": Plan(  # the rest of RULER, most of which is too hard for so small a model
        "smollm2",
        {2048: 8},
        ("niah_multikey_3", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
        _FEW_SETTINGS,
        max_new_tokens=64,
    ),
    "smollm2_4096": Plan("smollm2", {4096: 25}, settings=_FEW_SETTINGS),
    "smollm2_8192": Plan("smollm2", {8192: 30}, _NEEDLES[:3], _FEW_SETTINGS),
    "smollm2_depths": Plan("smollm2", {2048: 22}, ("needle_depths",)),
    "smollm2_depths_blocks": Plan("smollm2", {2048: 22}, ("needle_depths",), geometry="64x64"),
    "gemma3": Plan("gemma3", {2048: 4}, max_new_tokens=48, texts=True),
    "retrieval": Plan(
        "retrieval",
        {1024: 40, 2048: 40},
        tasks=None,
        settings=(
            *("dense", "never", "blasst:0.3", "blasst:0.5", "blasst:0.7", "blasst:0.5:head"),
            *("blasst:0.7:head", "bsfa:k=8", "bsfa:k=16", "budget:0.02", "budget:0.2"),
            *("window:0.5", "window:0.7"),
        ),
        max_new_tokens=64,
    ),
}


def measure(plan: Plan, work: Path, out: Path) -> None:
    """Runs a plan, or what is left of it in `work`; the result goes to `out`."""
    lengths = sorted(plan.samples)
    model, tokenizer, own, config = MODELS[plan.model](lengths)
    evaluate(
        model,
        tokenizer,
        tasks=own if plan.tasks is None else plan.tasks,
        lengths=lengths,
        samples=plan.samples,
        settings=plan.settings,
        texts=plan.texts,
        max_new_tokens=plan.max_new_tokens,
        config=config,
        geometry=plan.geometry,
        output_dir=work / out.stem,
        resume=True,
        name=NAMES[plan.model],
    )
    shutil.copyfile(work / out.stem / RESULT, out)


def main() -> None:
    """The command line: see the module's docstring."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("plans", nargs="*", metavar="PLAN", help=f"of {', '.join(PLANS)}")
    arguments.add_argument("--samples", help="instead of the plan's: by length, as 2048=20,4096=8")
    arguments.add_argument("--tasks", help="instead of the plan's, as niah_single_1,vt")
    arguments.add_argument("--settings", help="instead of the plan's, as blasst:0.5,window:0.5")
    arguments.add_argument("--geometry", help="instead of the plan's, as 64x64")
    arguments.add_argument("--no-texts", action="store_true", help="no perplexity and KL")
    arguments.add_argument("--max-new-tokens", type=int, help="instead of the plan's")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--out", type=Path, help="of one plan: instead of benchmarks/results")
    arguments.add_argument("--work", type=Path, default=WORK)
    given = arguments.parse_args()
    unknown = [name for name in given.plans if name not in PLANS]
    if unknown or (given.out and len(given.plans) != 1):
        arguments.error(f"expected plans among {', '.join(PLANS)}, and one of them with --out")
    torch.set_num_threads(given.threads)
    for name in given.plans or PLANS:
        changes = {
            "samples": given.samples and samples_by_length(given.samples),
            "tasks": given.tasks and given.tasks.split(","),
            "settings": given.settings and given.settings.split(","),
            "max_new_tokens": given.max_new_tokens,
            "geometry": given.geometry,
            "texts": False if given.no_texts else None,
        }
        plan = replace(PLANS[name], **{k: v for k, v in changes.items() if v is not None})
        out = given.out or HERE / "results" / f"evaluation_{name}.json"
        measure(plan, given.work, out)


if __name__ == "__main__":
    main()
