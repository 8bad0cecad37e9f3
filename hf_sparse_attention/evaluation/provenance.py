"""What numbers were made with: the machine, the versions, the model."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_sparse_attention._version import __version__
from hf_sparse_attention.backends import available_backends
from hf_sparse_attention.calibration.progress import weights_digest
from hf_sparse_attention.fingerprint import ModelFingerprint


def machine(model: Any) -> dict[str, Any]:
    """What `model` runs on, JSON-ready."""
    device = next(model.parameters()).device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "backends": [name for name, reason in available_backends().items() if reason is None],
        "hf_sparse_attention": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def about_model(model: Any, name: str | None = None) -> dict[str, Any]:
    """Which model it is, JSON-ready; a local folder is named by its last part only.

    Args:
        model: a transformers model.
        name: what to call it; None: where it was loaded from.
    """
    source = str(name or getattr(model, "name_or_path", "") or type(model).__name__)
    return {
        "name": Path(source).resolve().name if Path(source).exists() else source,
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "weights": weights_digest(model),
        "fingerprint": asdict(ModelFingerprint.of(model.config)),
    }


def _cpu() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
