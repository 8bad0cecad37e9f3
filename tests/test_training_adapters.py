"""`SparseAttentionCallback` with PEFT: adapters carry the thresholds they were trained with."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from training_runs import logged, model, ramp, samples, trainer
from transformers import AutoModelForCausalLM

from hf_sparse_attention import SparseAttentionConfig, collect_stats, load_thresholds
from hf_sparse_attention.control import present_config

TUNERS = {
    "lora": peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights="gaussian",
        task_type="CAUSAL_LM",
    ),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "v_proj"], feedforward_modules=[], task_type="CAUSAL_LM"
    ),
}


@pytest.mark.parametrize("tuner", TUNERS)
def test_an_adapter_is_trained_and_carries_its_thresholds(tuner: str, tmp_path: Path) -> None:
    base = model()
    base.save_pretrained(tmp_path / "base")
    tuned = peft.get_peft_model(base, TUNERS[tuner])
    before = {name: p.detach().clone() for name, p in tuned.named_parameters()}
    rows = [row["input_ids"] for row in samples(2, 192)]
    callback = ramp(target_sparsity=0.5, exclude_layers=[0], calibration_data=rows)
    run = trainer(
        tmp_path / "out", tuned, callback, max_steps=5, save_strategy="steps", save_steps=2
    )
    run.train()
    run.save_model()
    moved = {name for name, p in tuned.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert [x for (x,) in logged(run, "sparsity")][-1] > 0

    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-4"):
        assert not (folder / "config.json").exists()
        fresh = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", attn_implementation="blasst"
        )
        restored = peft.PeftModel.from_pretrained(fresh, folder)
        assert load_thresholds(restored, folder).ignore == ["model.layers.0.self_attn"]
    restored = peft.PeftModel.from_pretrained(fresh, tmp_path / "out")
    assert load_thresholds(restored, tmp_path / "out").fits == present_config(tuned).fits
    ids = rows[0][None]
    found = []
    for each in (tuned, restored):
        with collect_stats(each) as stats, torch.no_grad():
            found.append((each.eval()(input_ids=ids).logits, stats.counts("prefill")[1]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_pushing_an_adapter_while_training_keeps_it_an_adapter(tmp_path: Path) -> None:
    tuned = peft.get_peft_model(model(), TUNERS["lora"])
    run = trainer(tmp_path, tuned, ramp(), max_steps=5)
    run.state.max_steps = 5
    run.callback_handler.on_train_begin(run.args, run.state, run.control)
    run.callback_handler.on_push_begin(run.args, run.state, run.control)
    assert not (tmp_path / "config.json").exists()
    assert SparseAttentionConfig.from_pretrained(tmp_path) == present_config(tuned)
