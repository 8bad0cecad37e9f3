r"""Fine-tunes a LoRA adapter under sparsity: your model, your texts.

    python examples/finetune_lora.py --model org/name --data texts/ --output_dir adapter
    python examples/finetune_lora.py --model org/name --data rows.jsonl --output_dir adapter \
        --target_sparsity 0.7 --length 4096 --max_steps 500 --learning_rate 1e-4 --bf16

Every option of `transformers.TrainingArguments` can be given too; `accelerate launch` trains on
several devices. A model that is not calibrated yet is calibrated first. At the end the folder holds
the adapter, and beside it thresholds for the model as it is then.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_sparse_attention import (
    SparseAttentionCallback,
    SparseAttentionConfig,
    calibrate,
    set_sparse_attention,
)
from hf_sparse_attention.calibration.data import token_samples
from hf_sparse_attention.training import Schedule


@dataclass
class Options:
    """What is trained, and under which sparsity."""

    model: str = field(metadata={"help": "Folder or Hub id of the model."})
    data: str = field(
        metadata={"help": "A text file, a folder of texts, a .jsonl file, or a Hub dataset."}
    )
    split: str = field(default="train", metadata={"help": "Of a Hub dataset."})
    length: int = field(default=2048, metadata={"help": "Tokens a sample; texts are packed."})
    samples: int | None = field(default=None, metadata={"help": "At most so many; None: all."})
    evaluation_samples: int = field(default=8, metadata={"help": "Held out from training."})
    calibration_samples: int = field(default=8, metadata={"help": "Of the training samples."})
    target_sparsity: float = field(default=0.6, metadata={"help": "Blocks to skip in prefill."})
    schedule: str = field(
        default="linear", metadata={"help": "constant, linear, cosine or stepwise."}
    )
    dense_share: float = field(default=0.1, metadata={"help": "Of the steps, dense at first."})
    ramp_share: float = field(default=0.4, metadata={"help": "Of the steps, while it rises."})
    exclude_layers: list[int] = field(default_factory=list, metadata={"help": "These stay dense."})
    rank: int = field(default=16, metadata={"help": "Of LoRA's matrices."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA's scale is alpha / rank."})
    target_modules: str = field(default="all-linear", metadata={"help": "What LoRA adapts."})


def read(options: Options, tokenizer: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Samples `[length]` of token ids: those to train on, and those held out."""
    data: Any = options.data
    if not Path(data).exists():
        from datasets import load_dataset

        data = load_dataset(data, split=options.split, streaming=options.samples is not None)
    rows = list(token_samples(data, tokenizer, [options.length], options.samples))
    held_out = min(options.evaluation_samples, len(rows) // 5)
    if not held_out:
        raise ValueError(
            f"--data: expected at least 5 samples of {options.length} tokens, got {len(rows)}; "
            "give more text, or a smaller --length"
        )
    return rows[held_out:], rows[:held_out]


def load(options: Options, rows: list[Tensor]) -> Any:
    """The model on our attention, calibrated."""
    model = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation="blasst")
    settings = SparseAttentionConfig.from_model_config(model.config)
    if settings is None or not settings.fits:
        config = calibrate(model, rows[: options.calibration_samples], method="blasst")
        set_sparse_attention(model, config)
    return model


def main(arguments: list[str] | None = None) -> Trainer:
    parser = HfArgumentParser((Options, TrainingArguments), description=__doc__.split("\n")[0])
    options, args = parser.parse_args_into_dataclasses(arguments)
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows, held_out = read(options, tokenizer)
    model = load(options, rows)
    lora = LoraConfig(
        r=options.rank,
        lora_alpha=options.lora_alpha,
        target_modules=options.target_modules,
        task_type="CAUSAL_LM",
    )
    schedule = Schedule(options.schedule, options.dense_share, options.ramp_share)
    callback = SparseAttentionCallback(
        target_sparsity={"prefill": options.target_sparsity},
        schedule=schedule,
        exclude_layers=options.exclude_layers,
        calibration_data=rows[: options.calibration_samples],
    )

    def samples(ids: list[Tensor]) -> list[dict[str, Tensor]]:
        return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids]

    trainer = Trainer(
        get_peft_model(model, lora),
        args,
        train_dataset=samples(rows),
        eval_dataset=samples(held_out),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    report(trainer, options)
    return trainer


def report(trainer: Trainer, options: Options) -> None:
    """Perplexity of the held-out samples, dense and at the target sparsity."""
    losses = {}
    trained = set_sparse_attention(trainer.model)
    for name, factor in (("dense", 0.0), ("sparse", None)):
        set_sparse_attention(trainer.model, trained, threshold_scale_factor=factor)
        losses[name] = trainer.evaluate()["eval_loss"]
    set_sparse_attention(trainer.model, trained)
    if trainer.is_world_process_zero():
        dense, sparse = (math.exp(losses[name]) for name in ("dense", "sparse"))
        print(f"held-out perplexity: {dense:.3f} dense, {sparse:.3f} sparse")
        print(f"{trainer.args.output_dir} holds the adapter and its thresholds. To use them:\n")
        print(f"  model = AutoModelForCausalLM.from_pretrained({options.model!r},")
        print('                                               attn_implementation="blasst")')
        print(f"  model = PeftModel.from_pretrained(model, {trainer.args.output_dir!r})")
        print(f"  load_thresholds(model, {trainer.args.output_dir!r})")


if __name__ == "__main__":
    main(sys.argv[1:])
