"""The settings that an evaluation compares: how each is written, and what it asks for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from hf_sparse_attention.config import GRANULARITIES, Granularity

Kind = Literal["dense", "never", "blasst", "bsfa", "budget", "window"]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: How each kind is written, and what it is.
FORMS = {
    "dense": "PyTorch's own attention, what the others are compared with",
    "never": "our kernel, never skipping",
    "blasst:0.5": "BLASST at that target sparsity, one threshold for all",
    "blasst:0.5:layer": "with a threshold for each layer",
    "blasst:0.5:head": "with a threshold for each head",
    "bsfa:k=16": "BSFA, keeping k blocks of a block row",
    "budget:0.02": "no row loses more than eps / (1 + eps) of its softmax mass",
    "window:0.5": "a sliding window that leaves out that share of the blocks",
    "window:k=16": "a sliding window over k blocks, as the BSFA paper's baseline",
}
#: What is compared unless told otherwise.
DEFAULT_SETTINGS = (
    "dense",
    "never",
    "blasst:0.3",
    "blasst:0.5",
    "blasst:0.7",
    "blasst:0.5:head",
    "bsfa:k=8",
    "bsfa:k=16",
    "budget:0.02",
    "budget:0.1",
    "window:0.5",
)


@dataclass(frozen=True)
class Setting:
    """One way to run a model's attention.

    Args:
        kind: what decides; see `FORMS`.
        amount: target sparsity (blasst), eps (budget), or the share of blocks left out (window).
        level: k, the blocks that are kept (bsfa, window).
        granularity: BLASST: what has a threshold of its own.
    """

    kind: Kind
    amount: float | None = None
    level: int | None = None
    granularity: Granularity = "global"

    @property
    def name(self) -> str:
        """How it is written, such as `"blasst:0.5:head"`: `parse` gives it back."""
        parts: list[str] = [self.kind]
        if self.level is not None:
            parts.append(f"k={self.level}")
        elif self.amount is not None:
            parts.append(f"{self.amount:g}")
        if self.granularity != "global":
            parts.append(self.granularity)
        return ":".join(parts)

    @property
    def family(self) -> str:
        """What is drawn as one line: all of it but the amount."""
        own = "" if self.granularity == "global" else f", by {self.granularity}"
        return f"{self.kind}{own}"

    @classmethod
    def parse(cls, text: str) -> Setting:
        """The setting that `text` writes.

        Raises:
            ValueError: it is none of `FORMS`, or a number is out of its range.
        """
        kind, *rest = text.strip().split(":")
        try:
            if kind in ("dense", "never") and not rest:
                return cls(kind)  # type: ignore[arg-type]
            if kind == "blasst" and rest and (rest[1:] or ["global"])[0] in GRANULARITIES:
                granularity: Granularity = rest[1] if len(rest) == 2 else "global"  # type: ignore[assignment]
                if len(rest) <= 2:
                    return cls("blasst", _share(rest[0]), granularity=granularity)
            if kind in ("bsfa", "window") and len(rest) == 1 and rest[0].startswith("k="):
                return cls(kind, level=_level(rest[0][2:]))  # type: ignore[arg-type]
            if kind == "window" and len(rest) == 1:
                return cls("window", _share(rest[0]))
            if kind == "budget" and len(rest) == 1:
                return cls("budget", _budget(rest[0]))
        except ValueError as error:
            raise ValueError(f"setting {text!r}: {error}; valid forms: {_forms()}") from error
        raise ValueError(f"setting: expected one of the forms {_forms()}, got {text!r}")


def parse_settings(texts: Iterable[str | Setting]) -> list[Setting]:
    """The settings, dense first, which all are compared with, and none twice.

    Raises:
        ValueError: one is not of a valid form.
    """
    given = [x if isinstance(x, Setting) else Setting.parse(x) for x in texts]
    return list(dict.fromkeys([Setting("dense"), *given]))


def _forms() -> str:
    return ", ".join(FORMS)


def _share(text: str) -> float:
    value = _number(text)
    if not 0.0 < value < 1.0:
        raise ValueError(f"expected a share of the blocks in (0, 1), got {text!r}")
    return value


def _budget(text: str) -> float:
    value = _number(text)
    if not 0.0 <= value < float("inf"):
        raise ValueError(f"expected a finite eps of at least 0, got {text!r}")
    return value


def _level(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"expected a positive integer k, got {text!r}")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"expected a number, got {text!r}") from None
