"""`SparseAttentionCallback`: what a training run does at each step, logs, keeps and refuses."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import (
    FACTOR,
    GEOMETRY,
    STEPS,
    bsfa,
    logged,
    model,
    ramp,
    samples,
    settings,
    trainer,
)
from transformers import Trainer, TrainerCallback

from hf_sparse_attention import SparseAttentionConfig, collect_stats, set_sparse_attention
from hf_sparse_attention.control import present_config
from hf_sparse_attention.training import Schedule


class Recorder(TrainerCallback):
    """Stands for a reporter: keeps the entries that it is handed."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append({**kwargs["logs"], "step": state.global_step})


# The run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run with a checkpoint at each step and evaluations in between."""
    run = trainer(
        tmp_path_factory.mktemp("whole"),
        None,
        ramp(exclude_layers=[0]),
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=4,
    )
    run.recorder = Recorder()
    # As reporters do, it comes before the user's callbacks.
    run.callback_handler.callbacks.insert(1, run.recorder)
    run.train()
    return run


def test_logs_what_was_asked_for_and_what_was_skipped(whole: Trainer) -> None:
    asked = [x for (x,) in logged(whole, "threshold_scale_factor")]
    assert asked == pytest.approx([0.0, 0.0, FACTOR / 3, 2 * FACTOR / 3, FACTOR, FACTOR])
    skipped = [x for (x,) in logged(whole, "sparsity")]
    assert skipped[:2] == [0.0, 0.0]
    assert 0.0 < skipped[2] < skipped[3] < skipped[4]


def test_logs_the_certificate_where_something_ran_sparse(whole: Trainer) -> None:
    rows = [row for row in whole.state.log_history if "loss" in row]
    assert all("dropped_mass_max" not in row for row in rows[:2])
    for row in rows[2:]:
        assert 0.0 < row["dropped_mass_p99"] <= row["dropped_mass_max"] < 1.0


def test_reporters_see_what_the_history_holds(whole: Trainer) -> None:
    assert whole.recorder.seen == whole.state.log_history
    assert any("sparsity" in row for row in whole.recorder.seen)


def test_evaluations_are_counted_apart(whole: Trainer) -> None:
    row = next(row for row in whole.state.log_history if "eval_loss" in row)
    assert row["step"] == 4
    factor = 2 * FACTOR / 3
    assert row["eval_threshold_scale_factor"] == pytest.approx(factor)
    copy = model(threshold_scale_factor=factor, ignore=["model.layers.0.self_attn"])
    copy.load_state_dict(whole.model.state_dict())
    with collect_stats(copy) as stats, torch.no_grad():
        copy(samples(1)[0]["input_ids"][None])
    # The weights have moved since, a little.
    assert row["eval_sparsity"] == pytest.approx(stats.sparsity("prefill"), abs=0.1)
    assert "sparsity" not in row


def test_excluded_layers_stay_dense(whole: Trainer) -> None:
    with collect_stats(whole.model) as stats, torch.no_grad():
        whole.model(samples(1)[0]["input_ids"][None])
    assert list(stats.counts("prefill")) == [1]
    assert stats.dense("prefill", 0)


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_killed_run_resumes_exactly(whole: Trainer, step: int, tmp_path: Path) -> None:
    checkpoint = Path(whole.args.output_dir) / f"checkpoint-{step}"
    again = trainer(tmp_path, None, ramp(exclude_layers=[0]))
    again.train(resume_from_checkpoint=str(checkpoint))
    names = ("step", "loss", "grad_norm", "sparsity", "threshold_scale_factor")
    assert logged(again, *names) == logged(whole, *names)


def test_every_checkpoint_holds_the_settings_of_full_strength(whole: Trainer) -> None:
    folder = Path(whole.args.output_dir)
    kept = [
        SparseAttentionConfig.from_pretrained(folder / f"checkpoint-{n + 1}") for n in range(STEPS)
    ]
    assert all(config == kept[-1] for config in kept)
    assert kept[0].threshold_scale_factor["prefill"] == {"a": FACTOR, "b": 0.0}
    assert kept[0].min_length == 0
    assert kept[0].ignore == ["model.layers.0.self_attn"]
    assert present_config(whole.model) == kept[0]
    assert SparseAttentionConfig.from_pretrained(folder) == kept[0]


def test_a_model_saved_in_the_middle_of_the_ramp_keeps_full_strength(tmp_path: Path) -> None:
    class Saver(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["model"].save_pretrained(tmp_path / f"at{state.global_step}")

    trainer(tmp_path / "run", None, ramp(), Saver()).train()
    for step in (1, 3):
        saved = SparseAttentionConfig.from_pretrained(tmp_path / f"at{step}")
        assert saved.threshold_scale_factor["prefill"]["a"] == FACTOR
        assert saved.min_length == 0


def test_gradients_are_those_of_the_masked_forward(tmp_path: Path) -> None:
    """One step at full strength moves the weights as the same skipping does outside a trainer."""
    run = trainer(
        tmp_path, None, ramp(schedule="constant"), max_steps=1, optim="sgd", max_grad_norm=0.0
    )
    batches = iter(run.get_train_dataloader())
    run.train()
    torch.manual_seed(run.args.seed)
    alone = model(threshold_scale_factor=FACTOR)
    batch = next(iter(trainer(tmp_path).get_train_dataloader()))
    del batches
    alone.train()(**batch).loss.backward()
    for (name, trained), mine in zip(run.model.named_parameters(), alone.parameters(), strict=True):
        expected = mine.detach() - run.args.learning_rate * mine.grad
        assert torch.allclose(trained, expected, atol=1e-7), name


def test_gradient_accumulation_changes_settings_between_optimizer_steps_only(
    tmp_path: Path,
) -> None:
    seen: list[float] = []

    class Watcher(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            factor = present_config(kwargs["model"]).threshold_scale_factor
            seen.append(factor["prefill"]["a"])

    run = trainer(
        tmp_path,
        None,
        ramp(),
        Watcher(),
        gradient_accumulation_steps=2,
        per_device_train_batch_size=1,
    )
    run.train()
    assert [x for (x,) in logged(run, "threshold_scale_factor")][2:] == pytest.approx(seen[2:])


# Other goals


def test_target_sparsity_ramps_by_phase(tmp_path: Path) -> None:
    callback = ramp(target_sparsity={"prefill": 0.6})
    run = trainer(tmp_path, None, callback)
    run.train()
    assert [x for (x,) in logged(run, "target_sparsity")] == pytest.approx(
        [0, 0, 0.2, 0.4, 0.6, 0.6]
    )
    assert present_config(run.model).target_sparsity == {"prefill": 0.6, "decode": 0.3}


def test_a_target_takes_the_place_of_a_constant_factor(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, model(threshold_scale_factor=1.0), ramp(target_sparsity=0.6), max_steps=5
    )
    run.train()
    assert not present_config(run.model).threshold_scale_factor


def test_levels_come_down_to_the_one_asked_for(tmp_path: Path) -> None:
    made = model()
    set_sparse_attention(made, bsfa())
    callback = ramp(level=2, schedule=Schedule("linear", ramp_steps=2))
    run = trainer(tmp_path, made, callback, max_steps=4, save_strategy="steps", save_steps=2)
    run.train()
    assert [x for (x,) in logged(run, "level")] == [4, 2, 2, 2]
    skipped = [x for (x,) in logged(run, "sparsity")]
    assert skipped[0] < skipped[1]
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        kept = SparseAttentionConfig.from_pretrained(folder)
        assert kept.level == 2
        assert torch.equal(
            kept.tables.tensors[f"{GEOMETRY.name}.prefill.T"],
            bsfa().tables.tensors[f"{GEOMETRY.name}.prefill.T"],
        )


# Afterwards


def test_recalibrates_the_trained_model(tmp_path: Path) -> None:
    rows = [row["input_ids"] for row in samples(3, 192)]
    callback = ramp(target_sparsity=0.5, exclude_layers=[1], calibration_data=rows)
    run = trainer(tmp_path, None, callback, max_steps=5, learning_rate=1e-2)
    run.train()
    kept = SparseAttentionConfig.from_pretrained(tmp_path)
    assert replace(kept, thresholds_file=None) == present_config(run.model)
    assert kept.provenance["samples"] == 3
    assert kept.fits != settings().fits
    assert kept.target_sparsity["prefill"] == 0.5
    assert (kept.ignore, kept.min_length) == (["model.layers.1.self_attn"], 0)


def test_a_model_that_cannot_be_calibrated_keeps_its_thresholds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Random scores leave no 64x64 block out: no target is within reach."""
    rows, options = [samples(1)[0]["input_ids"]], {"geometries": "64x64"}
    run = trainer(tmp_path, None, ramp(calibration_data=rows, calibration_options=options))
    run.train()
    assert "could not be calibrated: target_sparsity: expected less than" in caplog.text
    assert SparseAttentionConfig.from_pretrained(tmp_path) == present_config(run.model)
    assert present_config(run.model).fits == settings().fits


def test_a_run_that_was_interrupted_starts_anew(tmp_path: Path) -> None:
    class CtrlC(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                raise KeyboardInterrupt

    made, callback = model(), ramp()
    run = trainer(tmp_path, made, callback, CtrlC())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.remove_callback(CtrlC)
    run.train()
    assert present_config(made).min_length == 0
    assert [x for (x,) in logged(run, "threshold_scale_factor")][-1] == FACTOR
    trainer(tmp_path, made, ramp()).train()  # another callback, the same model


def test_pushes_carry_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, None, ramp())
    run.train()
    shutil.rmtree(tmp_path)
    run.callback_handler.on_push_begin(run.args, run.state, run.control)
    assert SparseAttentionConfig.from_pretrained(tmp_path) == present_config(run.model)


def test_resuming_under_another_schedule_is_said(
    whole: Trainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = str(Path(whole.args.output_dir) / "checkpoint-5")
    callback = ramp(exclude_layers=[0], schedule="constant")
    trainer(tmp_path, None, callback).train(resume_from_checkpoint=checkpoint)
    assert "was trained with schedule" in caplog.text
    caplog.clear()
    trainer(tmp_path, None, ramp(exclude_layers=[0])).train(resume_from_checkpoint=checkpoint)
    assert "was trained with" not in caplog.text


def test_short_sequences_that_all_run_dense_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(tmp_path, model(min_length=1000), ramp(), max_steps=5)
    run.train()
    assert [x for (x,) in logged(run, "sparsity")] == [0.0] * 5
    assert caplog.text.count("no attention of training ran sparse") == 1
    assert "min_length" in caplog.text
