"""The result of an evaluation: measurements put together, a row for each cell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hf_sparse_attention.evaluation.ways import Calibrated
from hf_sparse_attention.types import PHASES

SCHEMA = 1
#: What is kept of a sample's counts, by phase.
COUNTED = ("sparsity", "layers", "heads", "least", "most", "p50", "p99", "max")


def assembled(
    configuration: Mapping[str, Any],
    calibrated: Calibrated,
    samples: Sequence[Mapping[str, Any]],
    texts: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The result, JSON-ready. Lists run over the samples of a cell, in their order.

    Returns:
        - `schema`, and what was run: `model`, `machine`, `configuration`, `calibration`;
        - `seconds`: how long the measurements took together;
        - `cells`: for each task, length and setting `scores`, `depths`, `first_token_s`,
          `tokens_per_s`, and by phase what was skipped (`measure.counted`);
        - `texts`: for each setting, length and phase `kl` and `nll` in nats, and `sparsity`, over
          the kinds of text.
    """
    about = dict(configuration)
    return {
        "schema": SCHEMA,
        "model": about.pop("model"),
        "machine": about.pop("machine"),
        "configuration": about,
        "calibration": {
            granularity: {
                name: config.provenance[name]
                for name in ("data", "samples", "lengths", "calibrated_by")
                if name in config.provenance
            }
            for granularity, config in calibrated.items()
        },
        "seconds": round(sum(x.get("seconds", 0.0) for x in (*samples, *texts)), 1),
        "cells": [
            _cell(task, length, setting, own)
            for (task, length), own in _grouped(samples, ("task", "length"))
            for setting in own[0]["settings"]
        ],
        "texts": [row for _, own in _grouped(texts, ("length",)) for row in _text_rows(own)],
    }


def _grouped(
    rows: Iterable[Mapping[str, Any]], names: Sequence[str]
) -> list[tuple[tuple[Any, ...], list[Mapping[str, Any]]]]:
    """Rows with the same values under `names` together, in the order in which they come."""
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(found.items())


def _cell(
    task: str, length: int, setting: str, samples: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    records = [sample["settings"][setting] for sample in samples]
    cell: dict[str, Any] = {
        "task": task,
        "length": length,
        "setting": setting,
        "scores": [record["score"] for record in records],
        "first_token_s": [_rounded(record["first_token_s"]) for record in records],
        "tokens_per_s": [_rounded(record["tokens_per_s"]) for record in records],
    }
    depths = [sample["depth"] for sample in samples]
    if any(depth is not None for depth in depths):
        cell["depths"] = [_rounded(depth) for depth in depths]
    for phase in PHASES:
        counts = [record["skipped"].get(phase) for record in records]
        if any(counts):
            cell[phase] = {
                name: [_rounded(x and x[name]) for x in counts]
                for name in COUNTED
                if any(x and x[name] is not None for x in counts)
            }
    return cell


def _text_rows(texts: Sequence[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    for setting in texts[0]["settings"]:
        for phase in PHASES:
            costs = [text["settings"][setting][phase] for text in texts]
            yield {
                "setting": setting,
                "length": texts[0]["length"],
                "phase": phase,
                "kinds": [text["text"] for text in texts],
                **{name: [_rounded(x[name]) for x in costs] for name in ("kl", "nll", "sparsity")},
            }


def _rounded(x: float | None) -> float | None:
    """To five digits: nothing here is known better."""
    return None if x is None or math.isnan(x) else float(f"{x:.5g}")
