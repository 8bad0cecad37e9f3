"""`optimize_for_cpu`: tries what may help, keeps what does, checks that predictions stay."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_sparse_attention.calibration.data import token_samples
from hf_sparse_attention.control import pretrained_model
from hf_sparse_attention.optimization.report import CpuOptimization, Difference, StepTaken, Timing
from hf_sparse_attention.optimization.snapshot import Snapshot
from hf_sparse_attention.optimization.steps import Dtype, LeftOut, Step, steps_for
from hf_sparse_attention.optimization.trial import DECODED, WARM_UP, Trial

logger = logging.getLogger(__name__)

#: Where a model keeps what was done to it.
ATTRIBUTE = "_cpu_optimization"

#: The perplexity ratio and the divergence, in nats, that a model may have from what it was.
LIMITS: dict[str, tuple[float, float]] = {
    "auto": (1.01, 0.01),
    "fp32": (1.01, 0.01),
    "bf16": (1.01, 0.01),
    "int8": (1.02, 0.05),
}
_SPELLINGS: dict[Any, Dtype] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.int8: "int8",
    "float32": "fp32",
    "bfloat16": "bf16",
}
SAMPLES = 2
#: Gains that are measured again before they are believed.
CLOSE = (0.9, 1.15)
SAME = Difference(1.0, 0.0, 0.0)


def optimize_for_cpu(
    model: nn.Module,
    dtype: Dtype | torch.dtype = "auto",
    *,
    data: Any = None,
    tokenizer: Any = None,
    prompt_length: int = 1024,
    new_tokens: int = 128,
    threads: int | None = None,
    max_perplexity_ratio: float | None = None,
    max_kl: float | None = None,
    progress: bool = True,
) -> CpuOptimization:
    """Makes a causal language model fast on this CPU, in place, for inference.

    Tries one step after the other (the number of threads, dtype, a cache that grows in place, this
    package's attention, prepacked or int8 weights), times each on `data`, and keeps it if it pays
    and if the predictions stay within the limits. `generate`, `forward` and pipelines work as
    before, at every length, and nothing recompiles. A second call does nothing.

    It takes some twenty prefills of `prompt_length` tokens and, while it runs, memory for the
    weights as they came and as they become. With int8, one kernel is compiled: some seconds.

    Args:
        model: a transformers causal language model on the CPU, in evaluation mode, plain or wrapped
            (PEFT). It can't be trained afterwards; with int8 weights it can't be saved, either.
        dtype: `"fp32"`, `"bf16"`, `"int8"` (linear layers; the rest is bfloat16), or a
            `torch.dtype`: what you ask for is done even where it does not pay. `"auto"`: bfloat16
            if that is faster here, never int8.
        data: what times and differences are measured on: token ids, texts, a path, a dataset (see
            `calibrate`); None for the bundled texts.
        tokenizer: for texts; None loads the model's own, from where the model came.
        prompt_length: tokens of the prompts that it is tuned for.
        new_tokens: tokens that will follow each: decides what a step must gain in which phase.
        threads: torch's number of threads; None: the physical cores, if that is faster.
        max_perplexity_ratio: over that of the model as it came; by default 1.01, int8 1.02.
        max_kl: divergence from the model's predictions as it came, in nats; by default 0.01, int8
            0.05.
        progress: show a bar.

    Returns:
        What was done, with each step's times and differences; `print(result.table())`.

    Raises:
        TypeError: not a transformers model, or no text to try it on.
        ValueError: the model is elsewhere than on the CPU, in training, already quantised or
            optimised otherwise; this CPU lacks what the dtype needs; or the dtype that was asked
            for changes the predictions beyond the limits. The model is left as it was.
    """
    kind = _SPELLINGS.get(dtype, dtype)
    if kind not in LIMITS:
        raise ValueError(f"dtype: expected one of {', '.join(get_args(Dtype))}, got {dtype!r}")
    pretrained = pretrained_model(model)
    done = getattr(pretrained, ATTRIBUTE, None)
    if isinstance(done, CpuOptimization):
        if kind not in ("auto", done.dtype):
            raise ValueError(
                f"model: expected one that is not optimised yet, got one for {done.dtype}; to have "
                f"{kind} load the model anew"
            )
        logger.info("the model is optimised for the CPU already; nothing is done")
        return done
    _check(model)
    started = time.perf_counter()
    samples = _samples(model, data, tokenizer, prompt_length)
    default_ratio, default_kl = LIMITS[kind]
    guard = Guard(
        default_ratio if max_perplexity_ratio is None else max_perplexity_ratio,
        default_kl if max_kl is None else max_kl,
    )
    before, old_threads = Snapshot(model), torch.get_num_threads()
    try:
        model.requires_grad_(False)
        trial = Trial(model, samples)
        steps = steps_for(model, kind, threads)
        taken = _climb(model, trial, steps, guard, new_tokens, progress)
    except BaseException:
        before.restore()
        torch.set_num_threads(old_threads)
        raise
    kept = [step for step in reversed(taken) if step.kept]
    result = CpuOptimization(
        dtype=kind,
        threads=torch.get_num_threads(),
        prompt_length=samples[0].shape[0] - DECODED,
        new_tokens=new_tokens,
        before=trial.before,
        after=next((step.timing for step in kept if step.timing), trial.before),
        difference=next((step.difference for step in kept if step.difference), SAME),
        steps=tuple(taken),
        seconds=time.perf_counter() - started,
    )
    setattr(pretrained, ATTRIBUTE, result)
    logger.info("optimised for the CPU:\n%s", result.table())
    return result


@dataclass(frozen=True)
class Guard:
    """How far predictions may move."""

    max_perplexity_ratio: float
    max_kl: float

    def refuses(self, difference: Difference) -> str | None:
        """Why a model that is off by `difference` is refused, or None."""
        if difference.perplexity_ratio > self.max_perplexity_ratio:
            return f"{difference}; expected a perplexity ratio up to {self.max_perplexity_ratio}"
        if difference.kl > self.max_kl:
            return f"{difference}; expected a KL up to {self.max_kl}"
        return None


def _climb(
    model: nn.Module,
    trial: Trial,
    steps: list[Step],
    guard: Guard,
    new_tokens: int,
    progress: bool,
) -> list[StepTaken]:
    """Takes the steps that pay; after each other one the model is what it was before it."""
    taken: list[StepTaken] = []
    present = trial.before
    bar = tqdm(steps, desc="optimizing for the CPU", unit="step", disable=not progress)
    for step in bar:
        bar.set_postfix_str(step.name)
        snapshot, threads = Snapshot(model), torch.get_num_threads()
        outcome = _try(model, trial, step, guard, present, new_tokens, snapshot)
        if outcome.kept and outcome.timing is not None:
            present = outcome.timing
        else:
            snapshot.restore()
            torch.set_num_threads(threads)
        logger.info("%s: %s; %s", step.name, "kept" if outcome.kept else "left out", outcome.reason)
        taken.append(outcome)
    return taken


def _try(
    model: nn.Module,
    trial: Trial,
    step: Step,
    guard: Guard,
    present: Timing,
    new_tokens: int,
    before: Snapshot,
) -> StepTaken:
    """Takes `step` and judges it against the `present` times, those of the model `before`.

    Raises:
        ValueError: the step was asked for and cannot be, or it changes the predictions too much.
    """
    try:
        what = step.apply(model)
    except LeftOut as error:
        if step.asked and error.impossible:
            raise ValueError(f"{step.name}: {error}") from error
        return StepTaken(step.name, False, str(error))
    timing, logits = trial.run(model)
    difference = trial.difference(logits)
    if (refusal := guard.refuses(difference)) is not None:
        if step.asked:
            raise ValueError(
                f"{step.name}: changes the model's predictions too much ({refusal}); the model is "
                "as it was"
            )
        return StepTaken(step.name, False, f"too far off: {refusal}", timing, difference)
    gain = present.total(new_tokens) / timing.total(new_tokens)
    if not step.asked and CLOSE[0] < gain < CLOSE[1]:
        gain = _once_more(model, trial, before, (present, timing), new_tokens)
    if gain < step.gain and not step.asked:
        reason = f"does not pay here ({gain:.2f}x): {what}"
        return StepTaken(step.name, False, reason, timing, difference)
    return StepTaken(step.name, True, f"{what} ({gain:.2f}x)", timing, difference)


def _once_more(
    model: nn.Module, trial: Trial, before: Snapshot, times: tuple[Timing, Timing], new_tokens: int
) -> float:
    """What the step gains if both sides run again, in turns: a machine is never quite alone."""
    after = Snapshot(model)
    old, new = (each.total(new_tokens) for each in times)
    before.restore()
    old += trial.run(model)[0].total(new_tokens)
    after.restore()
    new += trial.run(model)[0].total(new_tokens)
    return old / new


def _check(model: nn.Module) -> None:
    """Refuses models that this is not for."""
    pretrained = pretrained_model(model)
    name = type(pretrained).__name__
    devices = sorted({p.device.type for p in model.parameters()} - {"cpu"})
    if devices:
        raise ValueError(f"model: expected {name} on the CPU, got weights on {', '.join(devices)}")
    if model.training:
        raise ValueError(f"model: expected {name} for inference, got it in training; model.eval()")
    config = pretrained.config
    others = sorted({str(p.dtype) for p in model.parameters()} - _FLOATS)
    plain = {type(p) for p in model.parameters()} <= {nn.Parameter}
    if getattr(config, "quantization_config", None) is not None or others or not plain:
        found = ", ".join(others) or "a quantization of its own"
        raise ValueError(
            f"model: expected {name} in floating point, to be quantised here, got {found}"
        )
    if config.is_encoder_decoder or not pretrained.can_generate():
        raise ValueError(
            f"model: expected a causal language model (AutoModelForCausalLM), got {name}"
        )


_FLOATS = {"torch.float32", "torch.bfloat16", "torch.float16"}


def _samples(model: nn.Module, data: Any, tokenizer: Any, prompt_length: int) -> list[Tensor]:
    """Token ids of `prompt_length` and those decoded after it, fewer if the model takes fewer."""
    pretrained = pretrained_model(model)
    config = pretrained.config.get_text_config()
    if prompt_length < WARM_UP:
        raise ValueError(f"prompt_length: expected at least {WARM_UP}, got {prompt_length}")
    length = prompt_length + DECODED
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    if tokenizer is None and pretrained.name_or_path:
        tokenizer = pretrained.name_or_path
    samples = list(token_samples(data, tokenizer, [length], SAMPLES, part="validation"))
    largest = max(int(ids.max()) for ids in samples)
    if largest >= config.vocab_size:
        raise ValueError(
            f"data: expected token ids below {config.vocab_size}, got {largest}: another model's "
            "tokenizer?"
        )
    return samples
