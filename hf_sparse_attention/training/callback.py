"""`SparseAttentionCallback`: trains a model under the sparsity that it will run with.

The forward skips blocks as in inference, and the backward follows the very blocks that were kept,
so the model learns to do without the rest (BLASST's sparsity-aware training).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_sparse_attention.changes import updated
from hf_sparse_attention.config import SparseAttentionConfig
from hf_sparse_attention.control import present_config, run_with, set_sparse_attention
from hf_sparse_attention.training.checks import (
    Quantity,
    check_goal,
    check_run,
    excluded_modules,
)
from hf_sparse_attention.training.meter import SUFFIXES, Activity, Meter
from hf_sparse_attention.training.recalibration import calibration_samples, recalibrated
from hf_sparse_attention.training.reporting import before_reporters
from hf_sparse_attention.training.schedules import Schedule, ScheduleName
from hf_sparse_attention.types import PHASES, Phase

logger = logging.getLogger(__name__)

ByPhase = float | Mapping[Phase, float]

#: More keys than any request has: with this `min_length` everything runs dense.
_ALWAYS_DENSE = 2**31

#: Where the run's settings are kept in `TrainerState.stateful_callbacks`.
_STATE_KEY = "sparse_attention"


class SparseAttentionCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Ramps the sparsity of a model while `transformers.Trainer` (or TRL's) trains it.

    The model must run on our attention: `attn_implementation="blasst"` or `"bsfa"`. At each step
    the sparsity depends on the step's number alone, so a run that is resumed from a checkpoint
    goes on as if it had never stopped. What `save_pretrained` and checkpoints keep is full
    strength, whatever the step.

    Args:
        target_sparsity: BLASST, the share of blocks to skip at full strength, for both phases or
            by phase. Needs a calibrated model, or `config`.
        threshold_scale_factor: BLASST without calibration: lambda times the number of keys at full
            strength. Give this or `target_sparsity`.
        level: BSFA, the k at full strength; the ramp comes down from the largest calibrated level.
        schedule: the ramp: a `Schedule`, or the name of one.
        config: settings to train with, such as `calibrate` returns; None: those the model has.
        exclude_layers: numbers of the layers that stay dense, in training and afterwards.
        calibration_data: if given, thresholds are calibrated anew on the trained model, on this
            data ("bundled", or what `calibrate` takes), and saved into `args.output_dir`. Training
            moves scores, so the old thresholds no longer give the sparsity that they name.
        calibration_options: more arguments of `calibrate`.

    What it logs, with the trainer's own entries: `sparsity`, what was skipped since the last entry;
    `target_sparsity` (or `threshold_scale_factor`, `level`), what was asked for last, 0 while
    training dense; `dropped_mass_p99` and `dropped_mass_max`, the certificate: at most this share
    of a row's softmax mass was dropped. Names of decoding end with `_decode`; those of evaluations
    begin as the evaluation's others do.

    Raises:
        ValueError: a bad argument; and, before the first step, what `training/checks.py` refuses.
    """

    def __init__(
        self,
        *,
        target_sparsity: ByPhase | None = None,
        threshold_scale_factor: ByPhase | None = None,
        level: int | None = None,
        schedule: Schedule | ScheduleName = "linear",
        config: SparseAttentionConfig | None = None,
        exclude_layers: Iterable[int] = (),
        calibration_data: Any = None,
        calibration_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.quantity: Quantity
        self.quantity, self.full = check_goal(
            target_sparsity=target_sparsity,
            threshold_scale_factor=threshold_scale_factor,
            level=level,
        )
        self.schedule = schedule if isinstance(schedule, Schedule) else Schedule(schedule)
        self.config = config
        self.exclude_layers = sorted(set(exclude_layers))
        self.calibration_data = calibration_data
        self.calibration_options = dict(calibration_options or {})
        self._samples: list[Tensor] = []  # token ids to calibrate on
        self._base: SparseAttentionConfig | None = None  # at full strength
        self._applied: SparseAttentionConfig | None = None  # at this step
        self._meter: Meter | None = None
        self._said_dense = False

    # The trainer's events, in the order in which they come.

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks everything that could go wrong later, and starts to count."""
        model: nn.Module = kwargs["model"]
        self.schedule.steps(state.max_steps)
        config = self.config or self._before_the_ramp(present_config(model))
        check_run(model, config, self.quantity, self.full)
        if self.calibration_data is not None:
            options = {"tokenizer": kwargs.get("processing_class"), **self.calibration_options}
            self._samples = calibration_samples(model, self.calibration_data, options)
        ignore = {*config.ignore, *excluded_modules(model, self.exclude_layers)}
        config = updated(replace(config, ignore=sorted(ignore)), **self._at(1.0, config))
        self._note(state, config)
        self._base = self._applied = set_sparse_attention(model, config)
        self._meter = Meter(model)
        before_reporters(self)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets the model to what the schedule says for this step."""
        if self._meter is None:
            return
        wanted = self.config_at(state.global_step, state.max_steps)
        if wanted != self._applied:
            run_with(kwargs["model"], wanted)
            self._applied = wanted
        self._meter.count("training")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Whatever runs between steps is evaluation."""
        if self._meter is not None:
            self._meter.count("evaluation")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Adds the counts since the last entry to the trainer's logs."""
        logs: dict[str, float] | None = kwargs.get("logs")
        if self._meter is None or logs is None:
            return
        prefix = _evaluation_prefix(logs)
        activity: Activity = "training" if prefix is None else "evaluation"
        measured = self._meter.read(activity, args.device)
        asked = self._asked_for(measured)
        if activity == "training" and any(asked.values()):
            self._warn_if_dense(measured, args)
        entries = {(prefix or "") + name: x for name, x in {**measured, **asked}.items()}
        logs.update(entries)
        if state.log_history:  # the trainer has filed its copy already
            state.log_history[-1].update(entries)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes the settings and thresholds into the checkpoint."""
        if args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self._write(folder, kwargs["model"])

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes the settings and thresholds to where the trainer uploads from."""
        if args.should_save:
            self._write(Path(args.output_dir), kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Calibrates the trained model if asked to, saves its settings and leaves it with them."""
        if self._meter is None or self._base is None:
            return
        self._meter.stop()
        self._meter = None
        model: nn.Module = kwargs["model"]
        if self._samples:
            options = {"progress": not args.disable_tqdm, **self.calibration_options}
            self._base = recalibrated(model, self._base, self._samples, self.quantity, options)
        self._base = self._applied = set_sparse_attention(model, self._base)
        if args.should_save:
            self._write(Path(args.output_dir), model)

    # What those do.

    def config_at(self, step: int, max_steps: int) -> SparseAttentionConfig:
        """The settings at `step` of a run of `max_steps`; they depend on nothing else.

        Raises:
            RuntimeError: no run has begun, so there are no settings yet.
        """
        if self._base is None:
            raise RuntimeError("SparseAttentionCallback: expected a training run, found none begun")
        strength = self.schedule.strength(step, max_steps)
        if strength is None:
            return replace(self._base, min_length=_ALWAYS_DENSE)
        return updated(self._base, **self._at(strength, self._base))

    def _at(self, strength: float, config: SparseAttentionConfig) -> dict[str, Any]:
        """The scheduled setting, by name, at `strength` in (0, 1]."""
        if self.quantity == "level":
            # The largest k keeps the most; full strength is the k that was asked for.
            levels = [k for k in sorted(config.levels, reverse=True) if k >= self.full]
            return {"level": levels[round(strength * (len(levels) - 1))]}
        full = self.full if isinstance(self.full, Mapping) else dict.fromkeys(PHASES, self.full)
        return {self.quantity: {phase: strength * x for phase, x in full.items()}}

    def _write(self, folder: Path, model: nn.Module) -> None:
        """Writes the settings to where `model` is saved in `folder`, or soon will be."""
        if self._base is None:
            return
        adapters = getattr(model, "peft_config", {})
        for name, adapter in adapters.items():
            home = folder if name == "default" else folder / name  # as PEFT does
            if not (home / "adapter_config.json").exists():  # by it settings know where they are
                adapter.save_pretrained(home)
            self._base.save_pretrained(home)
        if not adapters:
            self._base.save_pretrained(folder)

    def _before_the_ramp(self, present: SparseAttentionConfig) -> SparseAttentionConfig:
        """What the model had before a run of ours that was interrupted in this process."""
        return self._base if self._base is not None and present == self._applied else present

    def _note(self, state: TrainerState, config: SparseAttentionConfig) -> None:
        """Files what the run does with the trainer's state; says where a resumed one differs."""
        what = {"schedule": asdict(self.schedule), "max_steps": state.max_steps}
        mine = json.loads(json.dumps({**what, "config": config.to_dict()}))
        before = state.stateful_callbacks.get(_STATE_KEY, mine)
        for name in (name for name in mine if mine[name] != before.get(name)):
            logger.warning(
                "SparseAttentionCallback: the checkpoint was trained with %s %s, and goes on with "
                "%s: the run is not the one it would have been",
                name,
                before.get(name),
                mine[name],
            )
        state.stateful_callbacks[_STATE_KEY] = mine

    def _asked_for(self, measured: Mapping[str, float]) -> dict[str, float]:
        """What the schedule asked for last, in the phases that were measured."""
        asked: dict[str, float] = {}
        for phase, suffix in SUFFIXES.items():
            value = getattr(self._applied, self.quantity)
            if isinstance(value, Mapping):
                value = value.get(phase)
            if isinstance(value, Mapping):  # a scale factor, as the config keeps it
                value = value["a"]
            dense = self._applied is not None and self._applied.min_length == _ALWAYS_DENSE
            if value is not None and f"sparsity{suffix}" in measured:
                asked[self.quantity + suffix] = 0.0 if dense else float(value)
        return asked

    def _warn_if_dense(self, measured: Mapping[str, float], args: TrainingArguments) -> None:
        """Says, once a run, that nothing runs sparse: it would be found out after training."""
        if self._meter is None or self._said_dense or "dropped_mass_max" in measured:
            return
        self._said_dense = True
        reasons = "; ".join(self._meter.reasons)
        if args.torch_compile:
            reasons += " (under torch_compile, give batches an attention_mask)"
        logger.warning("SparseAttentionCallback: no attention of training ran sparse: %s", reasons)


def _evaluation_prefix(logs: Mapping[str, float]) -> str | None:
    """What the names of an evaluation's entries begin with; None for an entry of training."""
    names = [name for name in logs if name.startswith("eval_")]
    losses = [name.removesuffix("loss") for name in names if name.endswith("_loss")]
    return min(losses, key=len, default="eval_") if names else None
