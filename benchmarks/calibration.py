"""What a calibration is worth on a real model: sparsity asked for and got, and what it costs.

    python -m benchmarks.calibration [--lengths 2048 4096 8192] [--work .cache/calibration]

SmolLM2-135M-Instruct is calibrated on the bundled texts' calibration part, one row of each kind,
cut to 2048, 4096 and 8192 tokens. Everything is then measured on the validation part: other
authors, or other needles. Two tables come of it:

- `held_out`: what each fit skips there at the activations of a dense pass, at other lengths, too,
  for every geometry, phase and granularity;
- `runs`: the sparse model itself. In prefill its predictions over the whole text (every fourth
  position), in decode the last 64 tokens after a dense prompt, against the dense model's.

A run that was cut off continues: what is in the JSON already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.demo_model import smollm2
from hf_sparse_attention import SparseAttentionConfig, collect_stats
from hf_sparse_attention.backends import cpu
from hf_sparse_attention.calibration.api import DEFAULT_LEVELS, DEFAULT_TARGETS, settings_from
from hf_sparse_attention.calibration.attach import attached, running
from hf_sparse_attention.calibration.bundled import KINDS, bundled
from hf_sparse_attention.calibration.cost import HeldOut
from hf_sparse_attention.calibration.data import token_samples
from hf_sparse_attention.calibration.observation import DEFAULT_GEOMETRIES, Observations
from hf_sparse_attention.calibration.prediction import sparsities
from hf_sparse_attention.calibration.progress import run
from hf_sparse_attention.config import GRANULARITIES
from hf_sparse_attention.thresholds import write_atomically
from hf_sparse_attention.types import PHASES, BlockGeometry, Phase

HERE = Path(__file__).parent
OUT = HERE / "results" / "calibration.json"
CALIBRATED = (2048, 4096, 8192)
#: Of the held-out text, in a dense pass.
HELD_OUT = (2048, 3072, 4096, 6144, 8192)
TARGETS = (0.3, 0.5, 0.7)
ASCENDING = BlockGeometry(64, 64, "ascending")
EVERY = 4
DENSE = SparseAttentionConfig(max_dropped_mass=dict.fromkeys(PHASES, 0.0), min_length=2**62)


class Bench:
    """The model, what was observed, and the result file."""

    def __init__(self, work: Path, out: Path) -> None:
        source = smollm2()
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        self.model: Any = model.eval()
        self.work, self.out = work, out
        self.data: dict[str, Any] = {"held_out": [], "runs": []}
        if out.exists():
            self.data = json.loads(out.read_text())
        self.data |= {"model": "SmolLM2-135M-Instruct, bfloat16", "machine": machine()}

    def save(self) -> None:
        """Writes the result file."""
        write_atomically(self.out, (json.dumps(self.data, indent=1) + "\n").encode())

    def held_out_ids(self, kind: str, length: int) -> Tensor:
        """The beginning of the validation text of `kind`."""
        texts = [bundled(kind, "validation")]  # type: ignore[arg-type]
        (ids,) = token_samples(texts, self.tokenizer, [length], 1)
        return ids

    def observed(
        self, name: str, samples: list[Tensor], geometries: tuple[BlockGeometry, ...]
    ) -> Observations:
        """What the samples tell; kept in the working folder under `name`."""
        levels = DEFAULT_LEVELS if name == "calibration" else ()
        observations = Observations(geometries, levels)
        file = self.work / f"{name}.safetensors"
        if file.exists():
            observations.load_state_dict(load_file(file))
            return observations
        print("observing", name, flush=True)
        with attached(self.model, observations):
            run(self.model, samples, observations, self.work / name)
        save_file(observations.state_dict(), file)
        return observations

    def calibrated(self) -> dict[str, SparseAttentionConfig]:
        """The settings of each granularity, and those of ascending order."""
        samples = list(token_samples(None, self.tokenizer, CALIBRATED, len(KINDS)))
        self.data["calibration"] = {
            "samples": len(samples),
            "lengths": sorted({len(ids) for ids in samples}),
            "targets": sorted(DEFAULT_TARGETS),
        }
        told = self.observed("calibration", samples, DEFAULT_GEOMETRIES)
        configs = {
            each: settings_from(told, self.model, "blasst", DEFAULT_TARGETS, each)
            for each in GRANULARITIES
        }
        short = [ids for ids in samples if len(ids) == min(CALIBRATED)]
        told = self.observed("ascending", short, (ASCENDING,))
        configs["ascending"] = settings_from(told, self.model, "blasst", DEFAULT_TARGETS, "global")
        return configs

    def dense_passes(self, configs: dict[str, SparseAttentionConfig]) -> None:
        """Fills `held_out`."""
        fits = configs["global"].fits
        self.data["fits"] = {name: fit.to_dict() for name, fit in fits.items()}
        rows = []
        for kind in KINDS:
            samples = [self.held_out_ids(kind, n) for n in HELD_OUT]
            told = self.observed(f"validation-{kind}", samples, DEFAULT_GEOMETRIES)
            for granularity in GRANULARITIES:
                for name, fit in fits.items():
                    for phase in fit.phases:
                        table = sparsities(configs[granularity], told, name, phase, TARGETS)
                        about = {"kind": kind, "granularity": granularity}
                        about |= {"geometry": name, "phase": phase}
                        rows += [
                            {**about, "length": length, "target": target, "measured": measured}
                            for length, target, measured in table
                        ]
        self.data["held_out"] = rows
        self.save()

    def runs(
        self,
        ways: list[tuple[str, str, float, SparseAttentionConfig]],
        length: int,
        phase: Phase,
    ) -> None:
        """Adds to `runs` each of the ways at `length`, on each kind of text."""
        known = {tuple(row[name] for name in KEY) for row in self.data["runs"]}
        for kind in KINDS:
            ids = self.held_out_ids(kind, length)
            todo = [
                (about, config)
                for way, geometry, setting, config in ways
                for about in [(phase, kind, length, way, geometry, setting)]
                if about not in known
            ]
            if not todo:
                continue
            print(phase, kind, length, len(todo), "runs", flush=True)
            measure = self.prefill if phase == "prefill" else self.decode
            for (about, _), row in zip(todo, measure(ids, [c for _, c in todo]), strict=True):
                self.data["runs"].append({**dict(zip(KEY, about, strict=True)), **row})
                self.save()

    @torch.no_grad()
    def prefill(
        self, ids: Tensor, configs: list[SparseAttentionConfig]
    ) -> Iterator[dict[str, float]]:
        """Sparsity, divergence and perplexity ratio of the whole text under each config."""
        dense = self._hidden(ids, DENSE)
        for config in configs:
            with collect_stats(self.model, dropped_mass=False) as stats:
                sparse = self._hidden(ids, replace(config, min_length=0))
            kl, lost, count = 0.0, 0.0, 0
            at = torch.arange(0, len(ids) - 1, EVERY)
            for rows in at.split(256):
                p, q = (
                    self.model.lm_head(hidden[rows]).float().log_softmax(-1)
                    for hidden in (dense, sparse)
                )
                kl += float((p.exp() * (p - q)).sum())
                lost += float((p - q).gather(1, ids[rows + 1, None]).sum())
                count += len(rows)
            yield _row(stats.sparsity("prefill"), kl / count, math.exp(lost / count))

    def decode(
        self, ids: Tensor, configs: list[SparseAttentionConfig]
    ) -> Iterator[dict[str, float]]:
        """The same for the last tokens, after a dense prompt."""
        for cost in HeldOut(self.model, [ids]).costs(configs, "decode"):
            yield _row(cost.sparsity, cost.kl, 1 + cost.ppl_increase)

    def _hidden(self, ids: Tensor, config: SparseAttentionConfig) -> Tensor:
        with running(self.model, config):
            hidden: Tensor = self.model.model(ids[None], use_cache=False).last_hidden_state[0]
        return hidden


KEY = ("phase", "kind", "length", "way", "geometry", "setting")


def _row(sparsity: float, kl: float, ratio: float) -> dict[str, float]:
    return {
        "sparsity": round(sparsity, 4),
        "kl": float(f"{kl:.4g}"),
        "perplexity_ratio": round(ratio, 5),
    }


def ways_of(
    configs: dict[str, SparseAttentionConfig], phase: Phase
) -> list[tuple[str, str, float, SparseAttentionConfig]]:
    """What is run: its name, geometry, setting (a target, k or eps) and config."""
    ways = []
    for geometry in ("64x1", "64x64"):
        blocks = BlockGeometry.from_name(geometry)
        for granularity in GRANULARITIES:
            for target in TARGETS:
                config = replace(configs[granularity], geometry=blocks)
                config = replace(config, target_sparsity=dict.fromkeys(PHASES, target))
                ways.append((granularity, geometry, target, config))
        fit = configs["global"].fits[geometry].phases[phase]
        for target in TARGETS:
            eps = fit.max_dropped_mass(target)
            if eps is not None:
                budget = SparseAttentionConfig(
                    geometry=blocks, max_dropped_mass=dict.fromkeys(PHASES, eps)
                )
                ways.append(("budget", geometry, target, budget))
        for level in DEFAULT_LEVELS:
            config = replace(configs["global"], method="bsfa", geometry=blocks, level=level)
            ways.append(("bsfa", geometry, level, config))
    if phase == "prefill":
        for target in TARGETS:
            config = replace(
                configs["ascending"],
                geometry=ASCENDING,
                target_sparsity=dict.fromkeys(PHASES, target),
            )
            ways.append(("ascending", "64x64", target, config))
    return ways


def machine() -> dict[str, Any]:
    """What the numbers were taken on; accuracy hardly depends on it."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE, check=False
    )
    return {
        "architecture": platform.machine(),
        "level": cpu.load_kernel().cpu_level(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(CALIBRATED))
    parser.add_argument("--work", type=Path, default=HERE.parent / ".cache" / "calibration")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.work, arguments.out)
    configs = bench.calibrated()
    bench.dense_passes(configs)
    for length in arguments.lengths:
        for phase in PHASES:
            bench.runs(ways_of(configs, phase), length, phase)


if __name__ == "__main__":
    main()
