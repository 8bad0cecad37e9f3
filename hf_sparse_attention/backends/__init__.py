"""The backends, one module each, and the choice among them.

A backend module has `NAME`, `GEOMETRIES` (names it can run, None for any), `PREFERRED` (the names
that suit it best, first choice first), `available()` and `supports(call, rule, geometry)` (each
None, or the reason why not) and `run(...)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from hf_sparse_attention.backends import cpu, cuda, dense, reference, triton
from hf_sparse_attention.types import AttentionCall, AttentionResult, BlockGeometry, SkipRule


class Backend(Protocol):
    """What a backend module offers."""

    NAME: str
    GEOMETRIES: tuple[str, ...] | None
    PREFERRED: tuple[str, ...]

    def available(self) -> str | None: ...

    def supports(
        self, call: AttentionCall, rule: SkipRule, geometry: BlockGeometry
    ) -> str | None: ...

    def run(
        self,
        call: AttentionCall,
        rule: SkipRule,
        geometry: BlockGeometry,
        *,
        return_skips: bool = False,
        return_dropped_mass: bool = False,
    ) -> AttentionResult: ...


#: In the order in which "auto" tries them. The reference keeps the rules, slowly; dense has none.
BACKENDS: dict[str, Backend] = {
    backend.NAME: backend for backend in (cpu, cuda, triton, reference, dense)
}


def available_backends() -> dict[str, str | None]:
    """Every backend's name, with None if this machine can run it, else the reason why not."""
    return {name: backend.available() for name, backend in BACKENDS.items()}


def select(
    call: AttentionCall, rule: SkipRule, geometry: BlockGeometry, name: str = "auto"
) -> tuple[Backend, dict[str, str]]:
    """The backend that will run `call`, and the reasons why those before it will not.

    Raises:
        ValueError: `name` is no backend, or the backend named cannot run the call.
    """
    if name != "auto":
        if name not in BACKENDS:
            valid = ", ".join(["auto", *BACKENDS])
            raise ValueError(f"backend: expected one of {valid}, got {name!r}")
        reason = _refusal(BACKENDS[name], call, rule, geometry)
        if reason is not None:
            raise ValueError(f"backend {name!r} cannot run this call: {reason}")
        return BACKENDS[name], {}
    reasons: dict[str, str] = {}
    for backend in BACKENDS.values():
        if _is_for_tests(backend, call):
            continue
        if backend in (cuda, triton, reference) and rule.is_never:
            continue  # nothing to skip: dense gives the same, faster
        reason = _refusal(backend, call, rule, geometry)
        if reason is None:
            return backend, reasons
        reasons[backend.NAME] = reason
    raise AssertionError("unreachable: the dense backend takes every call")


def choose_geometry(
    call: AttentionCall, geometries: Sequence[BlockGeometry], name: str = "auto"
) -> BlockGeometry:
    """Which of the calibrated `geometries` suits the backend that will run `call` best.

    The first of them (they come with the default one first) where no backend prefers any: plain
    torch runs all of them equally slowly.
    """
    if len(geometries) == 1:
        return geometries[0]
    by_name = {geometry.name: geometry for geometry in geometries}
    for backend in BACKENDS.values():
        if name != backend.NAME and (name != "auto" or _is_for_tests(backend, call)):
            continue
        for preferred in backend.PREFERRED:
            geometry = by_name.get(preferred)
            if geometry and _refusal(backend, call, SkipRule.never(), geometry) is None:
                return geometry
    return geometries[0]


def _is_for_tests(backend: Backend, call: AttentionCall) -> bool:
    """Whether only tests, which name it, want the backend: GPUs' kernels interpreted on the CPU."""
    return backend.NAME in (cuda.NAME, triton.NAME) and call.q.device.type == "cpu"


def _refusal(
    backend: Backend, call: AttentionCall, rule: SkipRule, geometry: BlockGeometry
) -> str | None:
    if backend.GEOMETRIES is not None and geometry.name not in backend.GEOMETRIES:
        return f"geometry {geometry.name} is not among its {', '.join(backend.GEOMETRIES)}"
    return backend.available() or backend.supports(call, rule, geometry)
