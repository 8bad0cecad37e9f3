"""What the CUDA variant needs beside g++: nvcc, its version and its flags.

nvcc is looked for where the variable NVCC says, under CUDA_HOME, on the PATH, and in the package
nvidia-cuda-nvcc of this Python.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

OLDEST = (12, 8)
FLAGS = [
    "-std=c++20",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-fno-gnu-unique",
    "-Xcudafe=--diag_suppress=20012",  # defaulted copies of types with host and device members
]


def find() -> str | None:
    """The path of nvcc, or None."""
    if named := os.environ.get("NVCC"):
        return shutil.which(named)
    places = [Path(os.environ["CUDA_HOME"]) / "bin"] if "CUDA_HOME" in os.environ else []
    places += map(Path, os.get_exec_path())
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        places += sorted(Path(folder).glob("cu*/bin"), reverse=True)  # of 13: nvidia/cu13/bin
    found = (shutil.which("nvcc", path=str(place)) for place in places)
    return next(filter(None, found), None)


@functools.cache
def version(nvcc: str) -> tuple[int, int]:
    """Major and minor version of CUDA."""
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    numbers = re.search(r"release (\d+)\.(\d+)", told)
    assert numbers, told
    return int(numbers[1]), int(numbers[2])


def refusal(nvcc: str | None) -> str | None:
    """Why nothing can be built with this nvcc, or None."""
    if nvcc is None:
        return (
            "no CUDA compiler: nvcc was not found. Install CUDA 13 (PyPI: nvidia-cuda-nvcc, "
            "nvidia-cuda-runtime), or set NVCC or CUDA_HOME"
        )
    found = version(nvcc)
    if found < OLDEST:
        return f"nvcc: expected version {OLDEST[0]}.{OLDEST[1]} or newer, got {found[0]}.{found[1]}"
    return None


def cuda_name(nvcc: str | None) -> str:
    """What CUDA is called in a variant's name, such as cu130."""
    major, minor = version(nvcc) if nvcc else (13, 0)
    return f"cu{major}{minor}"


def architecture_flags(capabilities: list[str]) -> list[str]:
    """For each capability its machine code; newer GPUs compile the first one's PTX as they load it.

    One with a letter, such as 9.0a, is for that architecture alone.
    """
    flags = []
    for i, capability in enumerate(capabilities):
        number = capability.replace(".", "")
        is_portable = number.isdigit()
        code = f"[sm_{number},compute_{number}]" if i == 0 and is_portable else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def link_flags(nvcc: str) -> list[str]:
    """For `nvcc -shared`: CUDA's runtime is the one that torch has loaded."""
    return ["-cudart=none", f"-Xlinker=-l:libcudart.so.{version(nvcc)[0]}"]
