"""The native CPU kernel. Interim: the kernel is not in the tree yet, so it says that it is unavailable."""

from __future__ import annotations

from hf_sparse_attention.types import AttentionCall, AttentionResult, BlockGeometry, SkipRule

NAME = "cpu"
GEOMETRIES: tuple[str, ...] | None = ("64x64",)


def available() -> str | None:
    """Why this machine cannot run the backend, or None."""
    return "the native CPU kernel is not built"


def supports(call: AttentionCall, rule: SkipRule, geometry: BlockGeometry) -> str | None:
    """Why this call cannot be served, or None."""
    return available()


def run(
    call: AttentionCall,
    rule: SkipRule,
    geometry: BlockGeometry,
    *,
    return_skips: bool = False,
    return_dropped_mass: bool = False,
) -> AttentionResult:
    """Never reached while the kernel is unavailable."""
    raise RuntimeError("the native CPU kernel is not built")
