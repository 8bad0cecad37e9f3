"""The kernel repo's `torch-universal` variant: built, checked, found, and loaded as users do."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import kernels
import kernels_loopback
import pytest
import torch
from kernels._rust import Digest, DigestAlgorithm, DigestValidationError, Metadata

from hf_sparse_attention.backends import cpu, kernel

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.usefixtures("universal_variant")

ROOT = Path(__file__).parents[1]
REPO = ROOT / "kernel_hub" / "block-skip-attention"
VARIANT = REPO / "build" / "torch-universal"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", **environment},
    )


def test_metadata_and_digest(tmp_path: Path) -> None:
    metadata = Metadata.read_from_file(VARIANT / "metadata.json")
    assert metadata.id.startswith("_block_skip_attention_universal_")
    assert (metadata.version, metadata.license) == (kernel.VERSION, "Apache-2.0")
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, VARIANT))
    assert "triton_kernels/prefill.py" in metadata.digest.files
    copy = shutil.copytree(VARIANT, tmp_path / "torch-universal")
    (copy / "triton_kernels" / "prefill.py").write_text("")
    with pytest.raises(DigestValidationError, match="prefill"):
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, copy))


def test_a_change_of_a_kernel_changes_the_id(tmp_path: Path) -> None:
    copy = shutil.copytree(ROOT / "kernel_hub", tmp_path / "kernel_hub", ignore=ignored)
    names = []
    for line in ("", "# changed\n"):
        with next(copy.glob("*/torch-ext/*/triton_kernels/rules.py")).open("a") as file:
            file.write(line)
        command = [sys.executable, str(copy / "build.py"), "--variant", "universal"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "built torch-universal" in done.stdout
        (metadata,) = copy.glob("*/build/torch-universal/metadata.json")
        names.append(json.loads(metadata.read_text())["id"])
    assert names[0] != names[1]


def ignored(_folder: str, names: list[str]) -> set[str]:
    return {"build", ".build"} & set(names)


@pytest.mark.usefixtures("cpu_kernel")
def test_one_schema_for_all_variants() -> None:
    compiled = getattr(torch.ops, cpu._namespace())
    universal = getattr(torch.ops, kernel.namespace("universal"))
    for op in ("forward", "backward", "cpu_level"):
        schemas = [
            str(getattr(x, op).default._schema).split("::")[1] for x in (compiled, universal)
        ]
        assert schemas[0] == schemas[1]


TRY = f"""
import torch, kernels
repo = {kernel.REPO_ID!r}
try:
    kernels.get_kernel(repo, version=1)
except ValueError as error:
    print("refused:", error)
attention = kernels.get_kernel(repo, version=1, trust_remote_code=[repo])
q, k = torch.randn(1, 2, 40, 16), torch.randn(1, 1, 40, 16)
out = attention.forward(q, k, k, scale=0.25, block_q=16, block_k=16)[0].transpose(1, 2)
exact = torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
torch.testing.assert_close(out, exact)
print(attention.add_op_namespace_prefix("forward"), attention.__file__)
"""


def test_get_kernel_from_a_hub(tmp_path: Path) -> None:
    """With no variant compiled for this machine, the universal one is what a user gets."""
    only = shutil.copytree(VARIANT, tmp_path / "build" / "torch-universal").parent
    with kernels_loopback.serve(kernel.REPO_ID, only) as hub:
        environment = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}
        done = python(TRY, **environment, HF_HUB_DISABLE_XET="1")
        downloads = [i for i, x in enumerate(hub.requests) if "/resolve/" in x]
        asked = [i for i, x in enumerate(hub.requests) if "/api/organizations/" in x]
    assert done.returncode == 0, done.stderr
    assert "refused:" in done.stdout
    assert "is not from a trusted publisher" in done.stdout
    assert max(asked) < min(downloads), "what is not trusted is not downloaded"
    assert "_universal_" in done.stdout
    assert str(tmp_path / "home") in done.stdout


@pytest.mark.parametrize(
    "level", ["", "build", "build/torch-universal"], ids=["repo", "build", "variant"]
)
def test_local_kernels_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    copy = shutil.copytree(VARIANT, tmp_path / "there/build/torch-universal").parents[1]
    monkeypatch.setenv("LOCAL_KERNELS", f"a/b=/c:{kernel.REPO_ID}={copy / level}")
    module = kernel.load.__wrapped__("universal")
    assert str(copy) in module.__file__
    shutil.copytree(VARIANT, copy / ".build/sanitized/torch-universal")
    assert [x.parent.name for x in kernel._builds(copy, "universal")] == ["build"]
    monkeypatch.setenv("LOCAL_KERNELS", f"{kernel.REPO_ID}={tmp_path / 'nowhere'}")
    assert kernel.load.__wrapped__("universal") == f"no build in {tmp_path / 'nowhere'}"


def test_without_the_package_kernels_a_local_build_still_loads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "kernels", None)
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    module = kernel.load.__wrapped__("universal")
    assert module.__name__ == kernel.namespace_of(module)


def test_a_universal_build_is_not_taken_for_the_cpu_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`kernels` takes it on a CPU that has no variant of its own."""
    shutil.copytree(VARIANT, tmp_path / "build" / "torch-universal")
    monkeypatch.setattr(kernel, "_CHECKOUT", tmp_path)
    monkeypatch.setattr(kernel, "_WHEEL", tmp_path / "none")
    monkeypatch.setattr(kernels, "get_kernel", lambda *_, **__: kernels.get_local_kernel(VARIANT))
    reason = kernel.load.__wrapped__("cpu", allow_hub=True)
    assert "no build in" in reason
    assert "from the Hub does not load: ValueError: expected the cpu variant" in reason


def test_the_builder_reads_every_schema_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "kernel_hub")
    schemas = importlib.import_module("universal").schemas
    assert schemas('ops.def("a(int x)"\n   " -> ()");') == ["a(int x) -> ()"]
    with pytest.raises(ValueError, match=r"expected every ops\.def to hold one schema string"):
        schemas("ops.def(NAME)")
