"""`SparseAttentionCallback` with what users combine it: TRL, compilation, bf16, reporters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from datasets import Dataset
from torch._dynamo.utils import counters
from training_runs import FACTOR, LENGTH, arguments, logged, model, ramp, samples, trainer
from transformers import Trainer

from hf_sparse_attention import (
    SparseAttentionConfig,
    available_backends,
    set_sparse_attention,
)
from hf_sparse_attention.training import Schedule


def test_trl_trains_with_it(tmp_path: Path) -> None:
    from tiny_tokenizer import byte_tokenizer
    from trl import SFTConfig, SFTTrainer

    made = model()
    rows = Dataset.from_dict({"input_ids": [row["input_ids"].tolist() for row in samples()]})
    args = SFTConfig(
        str(tmp_path),
        max_length=LENGTH,
        **{
            name: getattr(arguments(tmp_path), name)
            for name in ("max_steps", "learning_rate", "per_device_train_batch_size")
        },
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    run = SFTTrainer(
        made, args, train_dataset=rows, processing_class=byte_tokenizer(), callbacks=[ramp()]
    )
    run.train()
    factors, skipped = zip(*logged(run, "threshold_scale_factor", "sparsity"), strict=True)
    assert factors[-1] == FACTOR
    assert skipped[0] == 0 < skipped[-1]


def test_tensorboard_gets_the_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer(tmp_path, None, ramp(), report_to="tensorboard").train()
    (events,) = (tmp_path / "board").glob("events.*")
    written = events.read_bytes()
    for name in (b"train/sparsity", b"train/threshold_scale_factor", b"train/dropped_mass_max"):
        assert written.count(name) > 1, name


def test_bf16_autocast_trains_and_skips(tmp_path: Path) -> None:
    seen: set[torch.dtype] = set()
    made = model()

    def watch(module: Any, args: Any, output: torch.Tensor) -> None:
        seen.add(output.dtype)

    made.model.layers[0].self_attn.q_proj.register_forward_hook(watch)
    run = trainer(tmp_path, made, ramp(), bf16=True)
    run.train()
    assert seen == {torch.bfloat16}
    losses, skipped = zip(*logged(run, "loss", "sparsity"), strict=True)
    exact = trainer(tmp_path, None, ramp())
    exact.train()
    assert losses == pytest.approx([x for (x,) in logged(exact, "loss")], rel=0.02)
    assert skipped[-1] == pytest.approx(logged(exact, "sparsity")[-1][0], abs=0.02)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, tmp_path: Path) -> None:
    plain = trainer(tmp_path, None, ramp(schedule="constant"))
    plain.train()
    saving = trainer(
        tmp_path,
        None,
        ramp(schedule="constant"),
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    saving.train()
    names = ("loss", "sparsity", "dropped_mass_p99", "dropped_mass_max")
    assert logged(saving, *names) == logged(plain, *names)


@pytest.mark.skipif(
    available_backends().get("cpu", "absent") is not None,
    reason="the reference cannot be compiled, and the CPU kernel is not built",
)
def test_a_ramp_is_one_compiled_graph(tmp_path: Path) -> None:
    torch.compiler.reset()
    counters.clear()
    made = tiny_models.llama()
    del made.model.layers[1:]  # to compile faster
    made.config.num_hidden_layers = 1
    set_sparse_attention(made, SparseAttentionConfig(geometry="64x1", min_length=0))
    callback = ramp(threshold_scale_factor=200.0, schedule=Schedule("cosine", ramp_steps=4))
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    # Without a mask a compiled model must take a batch for packed sequences.
    rows = [{**row, "attention_mask": torch.ones(256)} for row in samples(12, 256)]
    run = Trainer(made, arguments(tmp_path, **options), train_dataset=rows, callbacks=[callback])
    run.train()
    torch.compiler.reset()
    skipped = [x for (x,) in logged(run, "sparsity")]
    assert len(set(skipped)) > 3
    assert counters["stats"]["unique_graphs"] == 2  # the first call also makes the counters
