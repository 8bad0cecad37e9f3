"""How fast a model is under each setting, by length: prefill, decode, and where skipping pays."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from hf_sparse_attention.calibration.bundled import bundled
from hf_sparse_attention.calibration.data import token_samples
from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.evaluation import provenance
from hf_sparse_attention.evaluation.measure import Answer, answer, counted
from hf_sparse_attention.evaluation.settings import Setting, parse_settings
from hf_sparse_attention.evaluation.summary import DENSE, SPEEDUPS, shortest_faster
from hf_sparse_attention.evaluation.ways import ThresholdSource, Way, ways
from hf_sparse_attention.stats import collect_stats
from hf_sparse_attention.types import PHASES, BlockGeometry

DEFAULT_LENGTHS = (512, 1024, 2048, 4096)
DEFAULT_SETTINGS = ("dense", "never", "blasst:0.5", "blasst:0.7", "budget:0.02")
DEFAULT_ROUNDS = 3
DEFAULT_NEW_TOKENS = 16


def benchmark(
    model: Any,
    tokenizer: Any,
    *,
    lengths: Sequence[int] = DEFAULT_LENGTHS,
    settings: Sequence[str | Setting] = DEFAULT_SETTINGS,
    rounds: int = DEFAULT_ROUNDS,
    new_tokens: int = DEFAULT_NEW_TOKENS,
    config: SparseAttentionConfig | None = None,
    geometry: str | BlockGeometry | None = None,
    name: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Times a prompt of bundled prose and some decoding, under each setting in turn.

    In each round every setting runs once, in an order that changes from round to round; a speedup
    is the median of the rounds' ratios to dense. A round before them, not timed, counts what is
    skipped. The model is left as it was.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        lengths: of the prompt, in tokens.
        settings: what to compare with dense, as `settings.FORMS` writes it.
        rounds: how often.
        new_tokens: decoded after the prompt; no text ends early.
        config: calibrated settings, as for `evaluate`.
        geometry: the blocks that run; None: those that suit the backend best.
        name: what to call the model; None: where it was loaded from.
        progress: show a bar.

    Returns:
        JSON-ready: `model`, `machine`, what was run; `rows` for each length and setting:
        `first_token_s` and `tokens_per_s` of each round, `first_token_speedup` and
        `decode_speedup`, sparsity by phase; and `break_even`: by setting and speedup the shortest
        length from which on it is above 1, None where no length reaches that.

    Raises:
        ValueError: a bad argument, or a setting that lacks its thresholds; before any work.
    """
    wanted = parse_settings(settings)
    if not lengths or min(lengths) < 1 or rounds < 1 or new_tokens < 2:
        raise ValueError(
            "benchmark: expected positive lengths and rounds and at least 2 new tokens, got "
            f"{list(lengths)}, {rounds} and {new_tokens}"
        )
    thresholds = ThresholdSource(model, wanted, config, geometry)
    prompts = _prompts(tokenizer, sorted(set(lengths)))
    with tempfile.TemporaryDirectory() as scratch:
        found = thresholds.calibrated(tokenizer, lengths, Path(scratch), progress)
    chosen = ways(wanted, found, thresholds.geometry)
    rows = []
    total = len(prompts) * (rounds + 1) * len(chosen)
    with tqdm(total=total, desc="timing", unit=" runs", disable=not progress) as bar:
        for prompt in prompts:
            rows += _at_length(model, chosen, prompt, rounds, new_tokens, bar)
    return {
        "model": provenance.about_model(model, name),
        "machine": provenance.machine(model),
        "geometry": thresholds.geometry.name,
        "thresholds": thresholds.described(),
        "rounds": rounds,
        "new_tokens": new_tokens,
        "rows": rows,
        "break_even": {
            setting.name: {
                speedup: shortest_faster(
                    {row["length"]: row[speedup] for row in rows if row["setting"] == setting.name}
                )
                for speedup in SPEEDUPS
            }
            for setting in wanted
            if setting.name != DENSE
        },
    }


def _prompts(tokenizer: Any, lengths: Sequence[int]) -> list[Tensor]:
    found = list(token_samples([bundled("prose", "validation")], tokenizer, lengths, 1))
    if len(found) < len(lengths):
        raise ValueError(
            f"lengths: expected at most {max(map(len, found))} tokens, which the bundled text "
            f"has, got {max(lengths)}"
        )
    return found


def _at_length(
    model: Any, chosen: Sequence[Way], prompt: Tensor, rounds: int, new_tokens: int, bar: Any
) -> list[dict[str, Any]]:
    ids = prompt[None].to(next(model.parameters()).device)
    skipped, answers = {}, {way.setting.name: list[Answer]() for way in chosen}
    for way in chosen:
        with way.running(model), collect_stats(model) as stats:
            answer(model, ids, new_tokens)
        skipped[way.setting.name] = counted(stats)
        bar.update()
    for n in range(rounds):
        first = n % len(chosen)
        for way in [*chosen[first:], *chosen[:first]]:
            with way.running(model):
                answers[way.setting.name].append(answer(model, ids, new_tokens))
            bar.update()
    dense = answers[DENSE]
    return [
        {
            "length": len(prompt),
            "setting": name,
            "first_token_s": [x.first_token_s for x in own],
            "tokens_per_s": [x.tokens_per_s for x in own],
            "first_token_speedup": median(
                base.first_token_s / x.first_token_s for x, base in zip(own, dense, strict=True)
            ),
            "decode_speedup": median(
                sum(base.step_s) / sum(x.step_s) for x, base in zip(own, dense, strict=True)
            ),
            "sparsity": _sparsity(skipped[name]),
        }
        for name, own in answers.items()
    ]


def _sparsity(found: Mapping[Any, Mapping[str, float | None]]) -> dict[str, float | None]:
    return {phase: found[phase]["sparsity"] if phase in found else None for phase in PHASES}
