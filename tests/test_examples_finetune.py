"""The fine-tuning example, on a tiny model and a text file."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from test_docs import save_tiny_model
from transformers import AutoModelForCausalLM

from hf_sparse_attention import load_thresholds
from hf_sparse_attention.control import present_config

SCRIPT = Path(__file__).parent.parent / "examples" / "finetune_lora.py"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script's `main`, with a model and a text to go with it."""
    save_tiny_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The rain in Spain stays mainly in the plain. " * 100)
    monkeypatch.chdir(tmp_path)
    common = "--model model --data text.txt --output_dir out --max_steps 4 --use_cpu"
    more = "--report_to none --logging_steps 1 --save_steps 2 --per_device_train_batch_size 1"
    main = runpy.run_path(str(SCRIPT))["main"]
    return lambda options: main(f"{common} {more} {options}".split())


def test_trains_an_adapter_with_its_thresholds(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = run("--length 384 --target_sparsity 0.4 --exclude_layers 0")
    assert "held-out perplexity: " in capsys.readouterr().out
    base = AutoModelForCausalLM.from_pretrained("model", attn_implementation="blasst")
    restored = PeftModel.from_pretrained(base, "out")
    assert load_thresholds(restored, "out").fits == present_config(trainer.model).fits
    assert present_config(restored).target_sparsity["prefill"] == 0.4
    assert present_config(restored).ignore == ["model.layers.0.self_attn"]


def test_says_what_is_wrong_with_too_little_text(run: Any) -> None:
    with pytest.raises(ValueError, match="expected at least 5 samples of 1024 tokens, got 4"):
        run("--length 1024")
