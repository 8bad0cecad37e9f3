"""The CUDA variant compiled without a GPU: nothing spills, a skip is a branch, and it loads."""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_sparse_attention.backends import kernel

ROOT = Path(__file__).parents[1]
BUILDER = [sys.executable, str(ROOT / "kernel_hub/build.py"), "--variant", "cuda"]


@pytest.fixture(scope="module")
def library() -> Path:
    """The variant's library, built from the sources as they are; skips where there is no nvcc."""
    done = subprocess.run(BUILDER, capture_output=True, text=True)
    if done.returncode == 2:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    folder = ROOT / "kernel_hub/block-skip-attention/build"
    built = max(folder.glob("*-cu[0-9]*/metadata.json"), key=lambda path: path.stat().st_mtime)
    return built.parent / (json.loads(built.read_text())["id"] + ".abi3.so")


def cuobjdump(*arguments: str) -> str:
    """What CUDA's tool says, or the one that Triton carries."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = pytest.importorskip("triton", reason="cuobjdump was not found")
        tool = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


@functools.cache
def machine_code(library: Path) -> dict[str, list[str]]:
    """The instructions of every kernel for 8.0, by its mangled name."""
    text = cuobjdump("-sass", "-arch", "sm_80", str(library))
    sections = re.split(r"^\s*Function : (\S+)$", text, flags=re.M)
    return {
        name: [x for x in code.splitlines() if re.match(r"\s*/\*[0-9a-f]{4,}\*/ .*;", x)]
        for name, code in zip(sections[1::2], sections[2::2], strict=True)
    }


def code_of(library: Path, name: str) -> list[str]:
    (found,) = [code for mangled, code in machine_code(library).items() if name in mangled]
    return found


class Flow:
    """The basic blocks of one kernel's machine code, and which jumps to which."""

    def __init__(self, lines: list[str]) -> None:
        code = [re.match(r"\s*/\*([0-9a-f]+)\*/\s+(.*?)\s*;", line) for line in lines]
        instructions = [(int(x[1], 16), x[2]) for x in code if x]
        jump = re.compile(r"(@!?U?P\d+ )?(BRA|EXIT|RET)\b[^;]*?(?:(0x[0-9a-f]+))?$")
        jumps = {at: found for at, text in instructions if (found := jump.match(text))}
        targets = {int(x[3], 16) for x in jumps.values() if x[3]}
        self.blocks: list[list[str]] = []
        at_block: dict[int, int] = {}
        ends: list[re.Match[str] | None] = []
        fresh = True
        for at, text in instructions:
            if fresh or at in targets:
                at_block[at] = len(self.blocks)
                self.blocks.append([])
                ends.append(None)
            self.blocks[-1].append(text)
            ends[-1], fresh = jumps.get(at), at in jumps
        self.next: list[set[int]] = []
        for i, end in enumerate(ends):
            follows = {at_block[int(end[3], 16)]} if end and end[3] else set()
            # A branch on a condition: as a predicate in front, or as an operand.
            if (end is None or end[1] or re.search(r"BRA\S* !?U?P\d", end[0])) and i + 1 < len(
                ends
            ):
                follows.add(i + 1)
            self.next.append(follows)

    def count(self, blocks: set[int], word: str) -> int:
        return sum(word in line for i in blocks for line in self.blocks[i])

    def with_word(self, word: str) -> set[int]:
        return {i for i in range(len(self.blocks)) if self.count({i}, word)}

    def reachable(self, start: int, avoiding: set[int]) -> set[int]:
        found: set[int] = set()
        todo = [start]
        while todo:
            new = self.next[todo.pop()] - found - avoiding
            found |= new
            todo += new
        return found

    def loop_through(self, word: str, avoiding: set[int]) -> set[int]:
        """The blocks of a loop that holds `word` and none of `avoiding`."""
        for i in self.with_word(word) - avoiding:
            if i in (there := self.reachable(i, avoiding)):
                return {j for j in there if i in self.reachable(j, avoiding)}
        return set()


@pytest.mark.slow  # as are the others that build the variant, if it is not current
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_nothing_spills(library: Path, architecture: str) -> None:
    """On 8.0 no kernel keeps anything in local memory: spilled registers, or indexed arrays.

    But one: at 256 dimensions with a rule, a few registers are wanting. Compiled for 9.0, which has
    kernels of its own, some others lack a few as well.
    """
    text = cuobjdump("-res-usage", "-arch", architecture, str(library))
    used = re.findall(r"Function (\S+):\n.*? REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    # By head sizes, dtype, block_k and skipping; the shared ones; and those of the int8 copy of K.
    assert len(used) >= 42 + 5 + 14
    for name, registers, stack, local in used:
        few = architecture == "sm_90" or "ELi256ELi256ELi64ELb1E" in name
        assert int(stack) + int(local) <= (24 if few else 0), name
        assert int(registers) <= 255


KERNELS = {
    # part of the mangled name: products of scores, of values, copies of K and of V
    "PrefillINS0_8BFloat16ELi64ELi64ELi64ELb1E": (32, 32, 4, 4),
    "PrefillINS0_8BFloat16ELi128ELi128ELi64ELb1E": (64, 64, 8, 8),
    "PrefillINS0_7Float16ELi192ELi128ELi64ELb1E": (96, 64, 12, 8),
    "DecodeINS0_8BFloat16ELi128ELi128ELi64E": (16, 16, 8, 8),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_a_skip_goes_around_the_exponentials_the_load_of_v_and_its_product(
    library: Path, name: str
) -> None:
    """In the machine code, the loop over the blocks can be run with the scores' product alone."""
    scores, values, keys_copied, values_copied = KERNELS[name]
    flow = Flow(code_of(library, name))
    whole = flow.loop_through("HMMA", set())
    assert flow.count(whole, "HMMA.16816") == scores + values
    around_v = flow.with_word("LDSM.16.MT88")  # transposed: what V is read with
    exponentials = flow.with_word("MUFU.EX2")
    assert around_v
    assert exponentials
    skipping = flow.loop_through("HMMA", around_v | exponentials)
    assert skipping, "no way through the loop without exponentials and V"
    assert flow.count(skipping, "HMMA.16816") == scores
    if "Decode" in name:  # V may be asked for ahead, behind a branch
        copying = {i for i in flow.with_word("LDGSTS") if flow.count({i}, "LDGSTS")}
        assert flow.count(skipping & copying, "LDGSTS") == keys_copied + values_copied
    else:
        assert flow.count(skipping, "LDGSTS") == keys_copied
        assert flow.count(whole, "LDGSTS") == keys_copied + values_copied


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 128, 192, 256])
def test_the_proof_is_integer_products_of_the_copy_as_it_lies(library: Path, size: int) -> None:
    """32 keys of a warp: loads of 16 bytes, which are operands, and as many products as needed."""
    flow = Flow(code_of(library, f"prove_kernelINS0_8BFloat16ELi{size}E"))
    assert flow.count(set(range(len(flow.blocks))), "HMMA.16816") == size // 16  # the seed's
    scan = flow.loop_through("IMMA.16832.S8.U8", set())
    assert flow.count(scan, "IMMA.16832.S8.U8") == 4 * size // 32
    assert flow.count(scan, "128.CONSTANT") == 2 * size // 32 + 6  # keys, and three bounds of eight
    assert flow.count(scan, "BAR.SYNC") == 2  # a round of 128 keys, and a stretch of 1024
    assert not flow.count(scan, "HMMA")


@pytest.mark.slow
def test_dense_attention_has_no_vote(library: Path) -> None:
    """Skipping and dense prefill are one template; only the former votes."""
    votes = {
        skips: sum(
            "BAR.RED.AND" in line
            for line in code_of(library, f"PrefillINS0_8BFloat16ELi128ELi128ELi64ELb{skips}E")
        )
        for skips in (0, 1)
    }
    assert votes == {0: 0, 1: 1}


@pytest.mark.slow
def test_loads_beside_a_torch_without_cuda(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its schema and fakes work there; what it computes is for a GPU."""
    monkeypatch.syspath_prepend(ROOT / "kernel_hub")
    compiler = importlib.import_module("nvcc").find()
    assert compiler is not None
    real = re.search(
        r"TOP=(\S+)",
        subprocess.run(
            [compiler, "--dryrun", "-x", "cu", "-c", "/dev/null"], capture_output=True, text=True
        ).stderr,
    )
    assert real
    (runtime, *_) = Path(real[1]).glob("lib*/libcudart.so.*")
    ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
    module = kernel._import_plainly(library.parent)
    q = torch.empty(1, 2, 70, 64, dtype=torch.bfloat16)
    if not torch.cuda.is_available():
        with pytest.raises(NotImplementedError):
            module.forward(q, q, q, scale=1.0)
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(1, 2, 70, 64, dtype=torch.bfloat16, device="cuda")
        out, *_ = module.forward(q, q, q, scale=1.0)
    assert (out.shape, out.device.type) == ((1, 70, 2, 64), "cuda")


#: What the library may ask of CUDA's runtime: none of it waits, copies or allocates.
CALLED = {
    *("cudaLaunchKernel", "cudaFuncSetAttribute", "cudaGetErrorString", "cudaGetLastError"),
    *("cudaGetDevice", "cudaDeviceGetAttribute", "cudaGetDriverEntryPointByVersion"),
    *("cudaPeekAtLastError", "cudaLaunchKernelExC"),
}


@pytest.mark.slow
def test_nothing_waits_copies_or_allocates(library: Path) -> None:
    """So that a call can be captured in a CUDA graph; outputs are torch's, of known shapes."""
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    names = {line.split()[-1].partition("@")[0] for line in listed.splitlines()}
    runtime = {x for x in names if x.startswith(("cuda", "cu", "__cuda"))}
    assert "cudaLaunchKernel" in runtime
    registering = {x for x in runtime if x.startswith("__cuda")}
    assert runtime - registering <= CALLED
    torch_calls = {x for x in names if x.startswith(("aoti_torch", "torch_"))}
    assert not {x for x in torch_calls if "item" in x or "synchronize" in x or "copy_" in x}


def test_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    """PTX of the first one, for GPUs that are newer than all; of 9.0a there is none."""
    monkeypatch.syspath_prepend(ROOT / "kernel_hub")
    flags = importlib.import_module("nvcc").architecture_flags
    assert flags(["8.0", "9.0"]) == [
        "-gencode=arch=compute_80,code=[sm_80,compute_80]",
        "-gencode=arch=compute_90,code=sm_90",
    ]
    assert flags(["9.0a"]) == ["-gencode=arch=compute_90a,code=sm_90a"]


def test_the_repo_names_all_its_sources() -> None:
    """What build.toml does not list is not uploaded, and does not change a variant's id."""
    repo = ROOT / "kernel_hub/block-skip-attention"
    listed = set(re.findall(r'"(csrc[^"]*\.[a-z]+)"', (repo / "build.toml").read_text()))
    there = {x.relative_to(repo).as_posix() for x in repo.glob("csrc*/**/*.*") if x.is_file()}
    assert listed == there


def test_without_a_compiler_the_builder_says_so() -> None:
    environment = {**os.environ, "NVCC": "/nowhere/nvcc"}
    done = subprocess.run(BUILDER, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "no CUDA compiler" in done.stderr
