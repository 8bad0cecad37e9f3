"""The kernel repo `kernel_hub/block-skip-attention`: where its variants are found, and its op.

A variant is looked for, in this order: where `LOCAL_KERNELS` says for `REPO_ID`, and then nowhere
else; in the build of the checkout that this file lies in; in the build that an installed wheel
carries; and, only if the environment variable HF_SPARSE_ATTENTION_HUB_KERNELS is 1, on the Hub.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Literal, Protocol

import torch
from torch import Tensor

from hf_sparse_attention.types import AttentionCall, AttentionResult, BlockGeometry, SkipRule

REPO_ID = "hf-sparse-attention/block-skip-attention"
VERSION = 1
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_INT8_HEAD_SIZE = 512  # of keys that an int8 copy takes

Variant = Literal["cpu", "cuda", "emulated", "universal"]

_PACKAGE = Path(__file__).resolve().parents[1]
_CHECKOUT = _PACKAGE.parent / "kernel_hub" / "block-skip-attention"
_WHEEL = _PACKAGE / "_kernels"
_ORDERS = {"ascending": 0, "sink_diagonal": 1, "descending": 2}
_FOLDERS: dict[Variant, str] = {
    "cpu": "torch-stable-abi*-cpu-*",
    "cuda": "torch-stable-abi*-cu[0-9]*",
    "emulated": ".build/emulated",  # for tests, never uploaded
    "universal": "torch-universal",
}


@functools.cache
def load(variant: Variant, allow_hub: bool | None = None) -> ModuleType | str:
    """The variant's module, or why there is none; looked for once.

    Args:
        variant: "cpu" is the compiled one for CPUs, "cuda" that for GPUs, "emulated" the latter for
            a CPU, "universal" the Triton kernels.
        allow_hub: whether it may be downloaded; None asks HF_SPARSE_ATTENTION_HUB_KERNELS.
    """
    if allow_hub is None:
        allow_hub = os.environ.get("HF_SPARSE_ATTENTION_HUB_KERNELS", "") == "1"
    named = _named_folder()
    tried: list[str] = []
    for folder in (_CHECKOUT, _WHEEL) if named is None else (named,):
        found = _builds(folder, variant)
        if not found:
            tried.append(f"no build in {folder}")
            continue
        try:
            return _import_local(folder, found[0], variant)
        except (OSError, RuntimeError, ValueError, ImportError) as error:
            tried.append(f"the build in {folder} does not load: {_first_line(error)}")
    if named is None and allow_hub:
        try:
            return _from_hub(variant)
        except Exception as error:  # whatever the network and the Hub may raise
            tried.append(f"{REPO_ID} from the Hub does not load: {_first_line(error)}")
    return "; ".join(tried)


def _builds(folder: Path, variant: Variant) -> list[Path]:
    """The builds of the variant in `folder`: a kernel repo, its build folder, or one variant's."""
    places = [*folder.glob(f"build/{_FOLDERS[variant]}"), *folder.glob(_FOLDERS[variant])]
    if folder.match(_FOLDERS[variant]):
        places.append(folder)
    return [place for place in sorted(places) if (place / "metadata.json").is_file()]


def _named_folder() -> Path | None:
    """What the variable LOCAL_KERNELS, "repo=folder:repo=folder", has for our repo."""
    for entry in os.environ.get("LOCAL_KERNELS", "").split(":"):
        repo_id, _, folder = entry.partition("=")
        if repo_id == REPO_ID:
            return Path(folder)
    return None


def _import_local(folder: Path, build: Path, variant: Variant) -> ModuleType:
    """The variant `build` of the kernel repo (or the folder of builds) `folder`."""
    try:
        import kernels  # here, so that importing this package stays fast
    except ModuleNotFoundError:  # a bare machine: what lies here needs no downloader
        return _import_plainly(build)
    if variant == "emulated":  # no variant that `kernels` knows
        return _import_plainly(build)
    if variant != "cpu":
        return _checked(kernels.get_local_kernel(build), variant)
    return _checked(kernels.get_local_kernel(folder, backend="cpu"), variant)


def _import_plainly(build: Path) -> ModuleType:
    """The module in the folder `build`, under the name that `kernels` would give it."""
    name = json.loads((build / "metadata.json").read_text())["id"]
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, build / "__init__.py")
        if spec is None or spec.loader is None:
            raise ImportError(f"{build}: expected an __init__.py, got none")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _from_hub(variant: Variant) -> ModuleType:
    import kernels

    backend = "cpu" if variant == "cpu" else None  # None: what this torch is built for
    module = kernels.get_kernel(
        REPO_ID, version=VERSION, backend=backend, trust_remote_code=[REPO_ID]
    )
    return _checked(module, variant)


def _checked(module: ModuleType, variant: Variant) -> ModuleType:
    """`module`, unless `kernels` has chosen another variant: it takes the best for a backend."""
    name = namespace_of(module)
    if f"_{variant}_" not in name:
        raise ValueError(f"expected the {variant} variant, got {name}")
    return module


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def namespace_of(module: ModuleType) -> str:
    """Where in `torch.ops` the ops of a variant are."""
    return str(module.add_op_namespace_prefix("")).removesuffix("::")


def namespace(variant: Variant) -> str:
    """The same, of a variant that `load` finds.

    Raises:
        RuntimeError: there is none.
    """
    module = load(variant)
    if isinstance(module, str):
        raise RuntimeError(module)
    return namespace_of(module)


def unserved(call: AttentionCall, max_head_size: int) -> str | None:
    """Why no variant serves `call`, or None."""
    if call.mask is not None:
        return "an arbitrary mask has no block structure"
    if call.dropout > 0:
        return "attention dropout cannot be combined with block skipping"
    for name, x in (("q", call.q), ("k", call.k), ("v", call.v)):
        if x.dtype not in DTYPES:
            return f"{name} is {x.dtype}; float32, bfloat16 and float16 are compiled"
    if max(call.q.shape[-1], call.v.shape[-1]) > max_head_size:
        return f"head sizes are compiled up to {max_head_size}"
    return None


class Run(Protocol):
    """Computes `call` under `rule`; see `AttentionResult` for what comes back."""

    def __call__(
        self,
        call: AttentionCall,
        rule: SkipRule,
        geometry: BlockGeometry,
        *,
        return_skips: bool = False,
        return_dropped_mass: bool = False,
    ) -> AttentionResult: ...


def runner(name: str, namespace: Callable[[], str]) -> Run:
    """The `run` of the backend `name`, whose op lies in `namespace()` of `torch.ops`."""

    def run(
        call: AttentionCall,
        rule: SkipRule,
        geometry: BlockGeometry,
        *,
        return_skips: bool = False,
        return_dropped_mass: bool = False,
    ) -> AttentionResult:
        q, k, v = one_dtype(call)
        out, lse, counts, skips, dropped_mass = getattr(torch.ops, namespace()).forward(
            q,
            k,
            v,
            call.key_valid,
            call.q_offset,
            float32(call.sinks),
            float32(rule.log_lambda),
            float32(rule.block_threshold),
            float32(rule.max_dropped_mass),
            call.scale,
            call.causal,
            call.window or 0,
            call.softcap or 0.0,
            geometry.block_q,
            geometry.block_k,
            _ORDERS[geometry.order],
            geometry.split_k,
            rule.keep_sink,
            return_skips or (call.needs_grad and not rule.is_never),  # the backward reads them
            return_dropped_mass,
            call.int8_keys if k is call.k else None,
            0.5 if rule.expected_sparsity is None else rule.expected_sparsity,
        )
        return AttentionResult(
            out=out.to(call.q.dtype),
            lse=lse,
            counts=counts,
            skips=skips if return_skips else None,
            dropped_mass=dropped_mass if return_dropped_mass else None,
            backend=name,
        )

    return run


def appender(namespace: Callable[[], str]) -> Callable[[Tensor, Tensor, Tensor], None]:
    """The `append_int8_keys` of a backend whose ops lie in `namespace()` of `torch.ops`."""

    def append_int8_keys(k: Tensor, position: Tensor, copy: Tensor) -> None:
        """Enters `k` `[B, Hkv, n, D]` into `copy` at `position`, one int64, and behind.

        All on one device; a GPU's is not waited for.
        """
        getattr(torch.ops, namespace()).append_int8_keys(k, position, copy)

    return append_int8_keys


def one_dtype(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in one dtype: autocast may leave q and k in float32, v in bfloat16."""
    q, k, v = call.q, call.k, call.v
    if q.dtype == k.dtype == v.dtype:
        return q, k, v
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def float32(x: Tensor | None) -> Tensor | None:
    """`x` in float32, if there is one."""
    return None if x is None else x.to(torch.float32)
