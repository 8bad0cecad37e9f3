"""What this machine's CPU has: cores that are ours, and instructions for small dtypes."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

import torch

_CPUS = Path("/sys/devices/system/cpu")
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Physical cores that this process may run on, and has the time of (containers have quotas)."""
    if hasattr(os, "sched_getaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
        cores = len({_siblings(cpu) for cpu in cpus})
    else:
        cores = os.cpu_count() or 1
    try:
        quota, period = _CGROUP_QUOTA.read_text().split()
        if quota != "max":
            cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass  # no such limit here, or another system's
    return max(cores, 1)


def _siblings(cpu: int) -> str:
    """The hardware threads of the core that `cpu` belongs to."""
    try:
        return (_CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def lacks_bf16() -> str | None:
    """Why bfloat16 would be slow here, or None."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return None if fast else "this CPU has no instructions for bfloat16 products"


def lacks_int8() -> str | None:
    """Why int8 would be slow here, or None."""
    if lacks := lacks_bf16():
        return lacks  # the rest of the model computes in bfloat16
    fast = torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()
    return None if fast else "this CPU has no instructions for int8 products (VNNI or AMX)"
