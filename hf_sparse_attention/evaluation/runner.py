"""Runs an evaluation: tasks x lengths x settings, each sample under every setting in turn."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_sparse_attention.calibration.bundled import Kind, bundled
from hf_sparse_attention.calibration.cost import Cost, HeldOut
from hf_sparse_attention.calibration.data import token_samples
from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.evaluation import provenance, summary
from hf_sparse_attention.evaluation.arguments import (
    checked_lengths,
    checked_samples,
    chosen_tasks,
)
from hf_sparse_attention.evaluation.measure import answer, counted, ends_of
from hf_sparse_attention.evaluation.prompts import Prompts
from hf_sparse_attention.evaluation.results import assembled
from hf_sparse_attention.evaluation.samples import Sample, Task
from hf_sparse_attention.evaluation.settings import DEFAULT_SETTINGS, Setting, parse_settings
from hf_sparse_attention.evaluation.store import RESULT, Store, write_json
from hf_sparse_attention.evaluation.ways import ThresholdSource, Way, ways
from hf_sparse_attention.stats import collect_stats
from hf_sparse_attention.types import PHASES, BlockGeometry

DEFAULT_LENGTHS = (2048, 4096)
DEFAULT_SAMPLES = 10
#: Texts whose perplexity and divergence are measured, one of each at each length.
TEXTS: tuple[Kind, ...] = ("prose", "code")
#: Shorter texts have too few positions to compare.
SHORTEST_TEXT = 512


@dataclass(frozen=True)
class _Plan:
    """What is to be measured, ready to run."""

    model: Any
    ways: Sequence[Way]
    prompts: Prompts
    ends: Sequence[int]
    samples: Sequence[tuple[Task, int, Sample]]  # with the sample's number in its cell
    texts: Sequence[tuple[str, int, Tensor]]  # kind, length, token ids


def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    tasks: Sequence[str | Task] | None = None,
    lengths: Sequence[int] = DEFAULT_LENGTHS,
    settings: Sequence[str | Setting] = DEFAULT_SETTINGS,
    samples: int | Mapping[int, int] = DEFAULT_SAMPLES,
    texts: bool = True,
    max_new_tokens: int | None = None,
    seed: int = 0,
    config: SparseAttentionConfig | None = None,
    geometry: str | BlockGeometry | None = None,
    chat_template: bool = False,
    output_dir: str | Path | None = None,
    resume: bool = False,
    name: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """How accurate, how sparse and how fast `model` is under each setting.

    Every sample runs under every setting, one after the other, so that differences to dense
    attention are paired. Generation is greedy; it ends early where the score is 1 already, which
    more text cannot lower. The model itself is left as it was.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        tasks: names among `TASKS`, or tasks of your own; None: all of `TASKS`.
        lengths: in tokens, prompt and answer together.
        settings: what to compare, as `settings.FORMS` writes it; dense always runs, too.
        samples: of each task at each length; or by length.
        texts: also measure perplexity and KL on the bundled validation texts.
        max_new_tokens: where a task allows an answer more tokens, it gets so many; prompts stay as
            they are.
        seed: of the samples.
        config: calibrated settings; None: the model's own, if it has thresholds; else it is
            calibrated, on bundled prose and code, at `lengths`.
        geometry: the blocks that run; None: those that suit the backend best.
        chat_template: ask in the tokenizer's chat template.
        output_dir: measurements are kept there as they are made, and the result as
            `evaluation.json`; None: nowhere.
        resume: continue what is in `output_dir`, with more samples or tasks if you like; a run
            that was configured otherwise is refused.
        name: what to call the model; None: where it was loaded from.
        progress: show progress bars.

    Returns:
        What `evaluation.json` holds: see `results.assembled`; and its `summary.overview`.

    Raises:
        ValueError: a bad argument, or a setting that lacks its thresholds; before any work.
    """
    chosen = chosen_tasks(tasks)
    wanted = parse_settings(settings)
    lengths = checked_lengths(model, lengths)
    counts = checked_samples(samples, lengths)
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected a positive integer, got {max_new_tokens}")
    thresholds = ThresholdSource(model, wanted, config, geometry)
    configuration = {
        "model": provenance.about_model(model, name),
        "tasks": [task.name for task in chosen],
        "lengths": lengths,
        "settings": [setting.name for setting in wanted],
        "samples": samples if isinstance(samples, int) else {str(n): counts[n] for n in lengths},
        "texts": texts,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "chat_template": chat_template,
        "geometry": thresholds.geometry.name,
        "thresholds": thresholds.described(),
        "machine": provenance.machine(model),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch if output_dir is None else output_dir)
        store = Store(folder, configuration, resume)
        prompts = Prompts(tokenizer, chat_template)
        made = _samples(chosen, prompts, counts, seed, progress)
        if max_new_tokens is not None:
            made = [
                (task, n, replace(x, max_new_tokens=min(x.max_new_tokens, max_new_tokens)))
                for task, n, x in made
            ]
        calibrated = thresholds.calibrated(tokenizer, lengths, folder / "calibration", progress)
        plan = _Plan(
            model,
            ways(wanted, calibrated, thresholds.geometry),
            prompts,
            ends_of(model, tokenizer),
            made,
            _texts(tokenizer, lengths) if texts else [],
        )
        _warm_up(plan)
        measured = _run(plan, store, progress)
        result = assembled(configuration, calibrated, *measured)
        result["summary"] = summary.overview(result)
        write_json(folder / RESULT, result)
    return result


def _samples(
    tasks: Sequence[Task],
    prompts: Prompts,
    counts: Mapping[int, int],
    seed: int,
    progress: bool,
) -> list[tuple[Task, int, Sample]]:
    """All samples, shortest first: a length that a task has no room in is found out here."""
    cells = [(length, task) for length in counts for task in tasks]
    return [
        (task, n, sample)
        for length, task in tqdm(cells, desc="making samples", disable=not progress)
        for n, sample in enumerate(prompts.samples(task, length, counts[length], seed))
    ]


def _texts(tokenizer: Any, lengths: Sequence[int]) -> list[tuple[str, int, Tensor]]:
    """Of each kind one at each length that it reaches."""
    longer = [length for length in lengths if length >= SHORTEST_TEXT]
    return [
        (kind, len(ids), ids)
        for kind in TEXTS
        if longer
        for ids in token_samples([bundled(kind, "validation")], tokenizer, longer, 1)
    ]


def _warm_up(plan: _Plan) -> None:
    """Every setting once, briefly: kernels are loaded and memory is had before the clock runs."""
    _, _, sample = plan.samples[0]
    ids = plan.prompts.ids(sample).to(_device(plan.model))[:, :512]
    for way in plan.ways:
        with way.running(plan.model), collect_stats(plan.model):
            answer(plan.model, ids, 2)


def _run(
    plan: _Plan, store: Store, progress: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The measurements of samples and of texts, made or found in `store`."""
    found: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    total = len(plan.samples) + len(plan.texts)
    with tqdm(total=total, desc="evaluating", unit=" samples", disable=not progress) as bar:
        for task, n, sample in plan.samples:
            unit = f"{task.name}-{sample.length}-{n}"
            bar.set_postfix_str(unit, refresh=False)
            known = store.get(unit)
            if known is None:
                known = _measured(plan, task, n, sample)
                store.put(unit, known)
            elif known["answers"] != list(sample.answers):
                raise ValueError(
                    f"{store.folder}: expected {unit} to ask for {', '.join(sample.answers)}, got "
                    f"a measurement that asked for {', '.join(known['answers'])}; choose another "
                    "folder"
                )
            found[0].append(known)
            bar.update()
        for kind, length, ids in plan.texts:
            unit = f"text-{kind}-{length}"
            bar.set_postfix_str(unit, refresh=False)
            known = store.get(unit)
            if known is None:
                began = time.perf_counter()
                known = {"text": kind, "length": length, "settings": _costs(plan, ids)}
                known["seconds"] = time.perf_counter() - began
                store.put(unit, known)
            found[1].append(known)
            bar.update()
    return found


def _measured(plan: _Plan, task: Task, n: int, sample: Sample) -> dict[str, Any]:
    """One sample under every setting; which comes first changes from sample to sample."""
    began = time.perf_counter()
    ids = plan.prompts.ids(sample).to(_device(plan.model))

    def score(tokens: list[int]) -> float:
        return task.score(plan.prompts.text(tokens), sample.answers)

    records: dict[str, Any] = {}
    first = n % len(plan.ways)
    for way in [*plan.ways[first:], *plan.ways[:first]]:
        with way.running(plan.model), collect_stats(plan.model) as stats:
            found = answer(
                plan.model,
                ids,
                sample.max_new_tokens,
                ends=plan.ends,
                enough=lambda tokens: score(tokens) >= 1.0,
            )
        records[way.setting.name] = {
            "score": score(found.tokens),
            "output": plan.prompts.text(found.tokens),
            "first_token_s": found.first_token_s,
            "tokens_per_s": found.tokens_per_s,
            "skipped": counted(stats),
        }
    return {
        "task": task.name,
        "length": sample.length,
        "sample": n,
        "depth": sample.depth,
        "prompt_tokens": ids.shape[1],
        "answers": list(sample.answers),
        "seconds": time.perf_counter() - began,
        "settings": {way.setting.name: records[way.setting.name] for way in plan.ways},
    }


def _costs(plan: _Plan, ids: Tensor) -> dict[str, Any]:
    """What each setting costs on a text, by phase."""
    held_out = HeldOut(plan.model, [ids])
    found: dict[str, Any] = {way.setting.name: {} for way in plan.ways}
    for phase in PHASES:
        (costs,) = held_out.by_sample([way.running for way in plan.ways], phase)
        for way, cost in zip(plan.ways, costs, strict=True):
            found[way.setting.name][phase] = _cost(cost)
    held_out.close()
    return found


def _cost(cost: Cost) -> dict[str, float]:
    return {"kl": cost.kl, "nll": cost.nll, "sparsity": cost.sparsity}


def _device(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device
