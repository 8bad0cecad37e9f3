"""What `optimize_for_cpu` did, why, and what came of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Timing:
    """How long the model took on the trial's texts.

    Args:
        prefill: seconds until the prompt's next token is known.
        decode: seconds for each token after it.
    """

    prefill: float
    decode: float

    def total(self, new_tokens: int) -> float:
        """Seconds for a prompt and `new_tokens` after it."""
        return self.prefill + new_tokens * self.decode


@dataclass(frozen=True)
class Difference:
    """How far the model's predictions are from what they were, on the trial's texts.

    Args:
        perplexity_ratio: the perplexity over that of the model as it came.
        kl: Kullback-Leibler divergence from its predictions, in nats, mean over positions.
        max_error: the largest difference of any logit.
    """

    perplexity_ratio: float
    kl: float
    max_error: float

    def __str__(self) -> str:
        return (
            f"perplexity ratio {self.perplexity_ratio:.4f}, KL {self.kl:.2g} nats, "
            f"largest logit error {self.max_error:.2g}"
        )


@dataclass(frozen=True)
class StepTaken:
    """One step, kept or left out.

    Args:
        name: what it changes.
        kept: whether the model has it now.
        reason: what it did, or why it was left out.
        timing: the model with it; None if it could not be tried.
        difference: the model with it against the model as it came.
    """

    name: str
    kept: bool
    reason: str
    timing: Timing | None = None
    difference: Difference | None = None


@dataclass(frozen=True)
class CpuOptimization:
    """What `optimize_for_cpu` did to a model and measured.

    Args:
        dtype: what was asked for.
        threads: torch's number of threads now.
        prompt_length, new_tokens: the request that was optimised for, in tokens.
        before, after: times of the model as it came and as it is now.
        difference: of the model as it is now from the model as it came.
        steps: in the order in which they were tried.
        seconds: what all of this took.
    """

    dtype: str
    threads: int
    prompt_length: int
    new_tokens: int
    before: Timing
    after: Timing
    difference: Difference
    steps: tuple[StepTaken, ...]
    seconds: float

    @property
    def prefill_speedup(self) -> float:
        """Time to first token, before over after."""
        return self.before.prefill / self.after.prefill

    @property
    def decode_speedup(self) -> float:
        """Time of a token in decode, before over after."""
        return self.before.decode / self.after.decode

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def table(self) -> str:
        """Markdown: a line for each step, and what they come to."""
        steps = [
            _line(step.name, "yes" if step.kept else "no", step.timing, step.reason)
            for step in self.steps
        ]
        summary = (
            f"{self.prompt_length} tokens in, {self.new_tokens} out, {self.threads} threads: first "
            f"token {self.prefill_speedup:.2f}x, decode {self.decode_speedup:.2f}x as fast. "
            f"Finding this out took {self.seconds:.0f} s."
        )
        lines = [
            "| step | kept | prefill | decode | what, or why not |",
            "| --- | --- | --- | --- | --- |",
            _line("as it came", "", self.before, ""),
            *steps,
            _line("now", "", self.after, str(self.difference)),
            "",
            summary,
        ]
        return "\n".join(lines)


def _line(name: str, kept: str, timing: Timing | None, reason: str) -> str:
    times = ("", "") if timing is None else (f"{timing.prefill:.3g} s", f"{timing.decode:.2g} s")
    return f"| {name} | {kept} | {times[0]} | {times[1]} | {reason} |"
