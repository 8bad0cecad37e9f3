"""The linters, the type checker and the import contract, so that CI sees what `make lint` sees."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent

COMMANDS = {
    "ruff": ["ruff", "check", "."],
    "ruff-format": ["ruff", "format", "--check", "."],
    "mypy": ["mypy"],
    "import-contract": ["lint-imports"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_clean(command: list[str]) -> None:
    tool = shutil.which(command[0], path=BIN)
    assert tool, f"{command[0]} is not installed beside {sys.executable}; make setup installs it"
    done = subprocess.run([tool, *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_clang_format_is_clean() -> None:
    sources = [
        str(path)
        for suffix in ("cpp", "h", "cu", "cuh")
        for path in (ROOT / "kernel_hub").rglob(f"*.{suffix}")
        if not {"build", ".build"} & set(path.relative_to(ROOT).parts)
    ]
    tool = shutil.which("clang-format", path=BIN)
    assert tool, f"clang-format is not installed beside {sys.executable}"
    if not sources:
        pytest.skip("no C++ sources")
    done = subprocess.run([tool, "--dry-run", "--Werror", *sources], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_modules_stay_small() -> None:
    """House rule: none above about 300 lines (CONTRIBUTING.md)."""
    folders = (
        "hf_sparse_attention",
        "hf_sparse_attention_cli",
        "examples",
        "calibration_data",
        "benchmarks",
    )
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    paths += filter(Path.is_file, (ROOT / "kernel_hub").glob("*/csrc*/**/*"))
    sizes = {
        path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in paths
    }
    assert not {path: size for path, size in sizes.items() if size > 320}
