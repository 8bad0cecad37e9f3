"""What a wheel carries: the native variant where one is built, and a working package without it."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
BUILT = list(ROOT.glob("kernel_hub/*/build/*-cpu-*/metadata.json"))

# Run where only the unpacked wheel is importable, not the checkout.
PROBE = """
import json, torch, hf_sparse_attention as h
from hf_sparse_attention.backends import cpu
from hf_sparse_attention.calibration.bundled import manifest, bundled
import hf_sparse_attention_cli.app
kernel = cpu.load_kernel()
x = torch.randn(1, 2, 130, 32)
result = h.block_skip_attention(x, x, x, rule=h.SkipRule.blasst(0.1))
print(json.dumps({
    "package": h.__file__,
    "reason": h.available_backends()["cpu"],
    "kernel": getattr(kernel, "__file__", None),
    "backend": result.backend,
    "command": hf_sparse_attention_cli.app.__file__,
    "texts": {e["file"]: len(bundled(e["kind"], e["part"]).encode()) for e in manifest()},
}))
"""


def build(native: str, folder: Path) -> Path:
    """Build a wheel into `folder` and unpack it there: the wheel and, beside it, `unpacked`."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    env = {**os.environ, "HFSA_WHEEL_NATIVE": native}
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return wheel


def probe(folder: Path) -> dict[str, Any]:
    """What the package unpacked at `folder` says of itself, in a process of its own."""
    env = {key: value for key, value in os.environ.items() if key != "LOCAL_KERNELS"}
    env["PYTHONPATH"] = str(folder)
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    for name in ("package", "command"):
        assert str(found[name]).startswith(str(folder))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not BUILT, reason="no native variant is built")
def test_wheel_carries_the_native_kernel(tmp_path: Path) -> None:
    wheel = build("require", tmp_path)
    assert "-py3-none-linux_" in wheel.name
    found = probe(tmp_path / "unpacked")
    assert found["reason"] is None
    assert found["backend"] == "cpu"
    assert "hf_sparse_attention/_kernels/" in str(found["kernel"])


@pytest.mark.slow
def test_wheel_without_a_kernel_runs_on_the_reference(tmp_path: Path) -> None:
    wheel = build("skip", tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    found = probe(tmp_path / "unpacked")
    assert found["kernel"] is None
    assert "kernel_hub/build.py" in str(found["reason"])
    assert found["backend"] == "reference"
    texts = {path.name: path.stat().st_size for path in (ROOT / "calibration_data").glob("*.txt")}
    assert found["texts"] == texts, "calibrate(model) finds its texts in a wheel"
    assert not list((tmp_path / "unpacked").rglob("rebuild.py"))


def test_wheel_hook_refuses_an_unknown_choice(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir"]
    env = {**os.environ, "HFSA_WHEEL_NATIVE": "maybe"}
    done = subprocess.run(
        [*command, str(tmp_path), str(ROOT)], capture_output=True, text=True, env=env
    )
    assert done.returncode != 0
    assert "HFSA_WHEEL_NATIVE: expected one of" in done.stdout + done.stderr
