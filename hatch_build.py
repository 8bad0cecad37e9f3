"""Puts the built kernel variants into a wheel, so that its users need no compiler.

`python kernel_hub/build.py` leaves them under kernel_hub/<repo>/build/<variant>/. A wheel carries
each variant as hf_sparse_attention/_kernels/<variant>/ and, if one of them holds machine code, is
tagged for this platform; with none built it runs on the reference backend. An editable install
finds the checkout's own build and copies nothing. HFSA_WHEEL_NATIVE=require fails without a native
variant, =skip leaves all of them out.
"""

import os
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

CHOICES = ("auto", "require", "skip")


def built_variants(root: Path) -> dict[str, Path]:
    """The variants built under `root`/kernel_hub that go into a wheel: {name: its folder}."""
    return {
        metadata.parent.name: metadata.parent
        for metadata in sorted(root.glob("kernel_hub/*/build/*/metadata.json"))
        if is_native(metadata.parent.name) or metadata.parent.name == "torch-universal"
    }


def is_native(variant: str) -> bool:
    """Whether a variant of that name holds machine code for this platform."""
    return "-cpu-" in variant or "-cu1" in variant


class NativeVariantHook(BuildHookInterface):
    """Hatchling's hook: see the module's docstring."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the built variants to `build_data`; `version` is "standard" or "editable"."""
        choice = os.environ.get("HFSA_WHEEL_NATIVE", "auto")
        if choice not in CHOICES:
            raise ValueError(f"HFSA_WHEEL_NATIVE: expected one of {CHOICES}, got {choice!r}")
        if version == "editable" or choice == "skip":
            return
        variants = built_variants(Path(self.root))
        native = any(map(is_native, variants))
        if choice == "require" and not any("-cpu-" in name for name in variants):
            raise RuntimeError(
                "HFSA_WHEEL_NATIVE=require, but no CPU variant lies under kernel_hub/*/build/; "
                "run `python kernel_hub/build.py` first"
            )
        for name, folder in variants.items():
            for file in sorted(folder.rglob("*")):
                if file.is_file() and "__pycache__" not in file.parts:
                    target = Path("hf_sparse_attention/_kernels") / name / file.relative_to(folder)
                    build_data["force_include"][str(file)] = target.as_posix()
        if not native:
            return
        build_data["pure_python"] = False
        # The stable ABIs of torch and Python make one wheel fit every Python 3.
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
