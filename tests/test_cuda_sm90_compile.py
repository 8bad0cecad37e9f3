"""The sm_90a kernels compiled without a GPU: what ptxas says of them, and their machine code."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "kernel_hub/block-skip-attention/csrc_cuda"
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")

#: Type, head sizes, block_k, then whether there is a rule, V comes on demand, and it is the general
#: version; and the products of Q K^T and P V in one step.
VERSIONS = {
    "dense": ("BFloat16, 128, 128, 128, false, false, false", 8, 8),
    "always": ("BFloat16, 128, 128, 128, true, false, false", 8, 8),
    "demand": ("BFloat16, 128, 128, 128, true, true, false", 8, 8),
    "general": ("BFloat16, 128, 128, 128, true, false, true", 8, 8),
    "float16": ("Float16, 64, 64, 128, true, true, false", 4, 8),
    "keys64": ("BFloat16, 128, 128, 64, true, true, false", 8, 4),
    "large": ("BFloat16, 256, 256, 64, true, false, false", 16, 4),
    "latent": ("BFloat16, 192, 128, 128, true, false, true", 12, 8),
}
#: Of decode: type, head sizes, block_k; a warp's products of scores and of values, for its quarter
#: of the keys; and the boxes that a block of K is.
DECODES = {
    "decode": ("BFloat16, 128, 128, 64", 16, 16, 2),
    "decode 64": ("Float16, 64, 64, 64", 8, 8, 1),
    "decode wide": ("BFloat16, 128, 128, 128", 32, 32, 2),
    "decode latent": ("BFloat16, 192, 128, 64", 24, 16, 3),
    "decode latent wide": ("BFloat16, 192, 128, 128", 48, 32, 3),
    "decode 256": ("Float16, 256, 256, 64", 32, 32, 4),
}
SKIPPING = [name for name in VERSIONS if name != "dense"]


def find_disassembler() -> str | None:
    """cuobjdump of CUDA, or the one that Triton carries."""
    try:
        import triton
    except ModuleNotFoundError:
        return shutil.which("cuobjdump")
    carried = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return shutil.which("cuobjdump") or (str(carried) if carried.is_file() else None)


class Code:
    """A kernel's instructions, and which may follow which."""

    def __init__(self, listing: str) -> None:
        found = re.findall(r"^\s+/\*([0-9a-f]+)\*/\s+(.*?);", listing, re.M)
        self.lines = [text.strip() for _, text in found]
        at = {int(address, 16): i for i, (address, _) in enumerate(found)}
        self.next: list[set[int]] = []
        for i, line in enumerate(self.lines):
            ends = re.match(r"(BRA 0x|EXIT)", line)  # without a condition
            after = {i + 1} if not ends and i + 1 < len(self.lines) else set()
            if jump := re.match(r"(?:@!?U?P\d+ )?BRA.* (0x[0-9a-f]+)$", line):
                after.add(at[int(jump[1], 16)])
            self.next.append(after)
        self.last: list[set[int]] = [set() for _ in self.next]
        for i, after in enumerate(self.next):
            for j in after:
                self.last[j].add(i)

    def where(self, *words: str) -> set[int]:
        return {i for i, line in enumerate(self.lines) if any(word in line for word in words)}

    def reachable(
        self, start: int, avoiding: set[int], ways: list[set[int]] | None = None
    ) -> set[int]:
        """What can be reached from `start` without running any of `avoiding`."""
        found: set[int] = set()
        todo = [start]
        while todo:
            new = (ways or self.next)[todo.pop()] - found - avoiding
            found |= new
            todo += new
        return found

    def loop(self, through: int, avoiding: set[int]) -> set[int]:
        """The instructions on ways from `through` to itself."""
        return self.reachable(through, avoiding) & self.reachable(through, avoiding, self.last)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the compiler says, and the file of machine code with all versions."""
    folder = tmp_path_factory.mktemp("sm90")
    kernels = "".join(
        f"auto* {name} = &prefill_kernel<Config<{config}>>;\n"
        for name, (config, _, _) in VERSIONS.items()
    )
    kernels += "".join(
        f"auto* decode{i} = &decode_kernel<Decode<bsa::cuda::{config}>>;\n"
        for i, (config, *_) in enumerate(DECODES.values())
    )
    headers = '#include "sm90/decode.cuh"\n#include "sm90/prefill.cuh"\n'
    source = folder / "kernels.cu"
    source.write_text(f"{headers}using namespace bsa::cuda::sm90;\n{kernels}")
    flags = "-std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -cubin -Xptxas=-v"
    target = folder / "kernels.cubin"
    done = subprocess.run(
        ["nvcc", *flags.split(), f"-I{SOURCES}", str(source), "-o", str(target)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr, target


@pytest.fixture(scope="module")
def code(compiled: tuple[str, Path]) -> Callable[[str], Code]:
    tool = find_disassembler()
    if tool is None:
        pytest.skip("no cuobjdump")
    listing = subprocess.run(
        [tool, "-sass", str(compiled[1])], capture_output=True, text=True, check=True
    ).stdout
    by_config = {}
    for part in listing.split("Function :")[1:]:
        name = part.split()[0]
        numbers = re.findall(r"L[ib](\d+)E", name)
        kind = "BFloat16" if "8BFloat16" in name else "Float16"
        flags = ["false", "true"]
        config = [kind, *numbers[:3], *(flags[int(x)] for x in numbers[3:])]
        by_config[", ".join(config)] = part
    return lambda version: Code(by_config[(VERSIONS | DECODES)[version][0]])


def test_nothing_spills_and_no_product_waits_without_need(compiled: tuple[str, Path]) -> None:
    told, _ = compiled
    assert "warning" not in told, told  # C7510: products are serialised; C7508: setmaxnreg ignored
    sizes = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", told)
    assert sizes == [("0", "0", "0")] * len(VERSIONS | DECODES)


@pytest.mark.parametrize("version", VERSIONS)
def test_products_are_as_designed(code: Callable[[str], Code], version: str) -> None:
    """Q K^T with and without a product pending; P V there, and for the last block alone."""
    _, scores, values = VERSIONS[version]
    found = code(version)
    assert len(found.where("HGMMA")) == 2 * scores + 2 * values
    assert len(found.where("tnspB")) == 2 * values
    assert not found.where("LDL", "STL")
    assert len(found.where("USETMAXREG")) == 2


@pytest.mark.parametrize("version", SKIPPING)
def test_a_skip_goes_around_the_exponentials_and_the_product_with_v(
    code: Callable[[str], Code], version: str
) -> None:
    """The loop over the blocks can be run with the scores' product and one vote alone."""
    found = code(version)
    start = min(found.where("HGMMA"))
    whole = found.loop(start, set())
    assert found.where("HGMMA") - found.where("tnspB") <= whole
    costly = found.where("tnspB")
    if version not in ("general", "latent"):  # there, softcap and budget have exponentials too
        costly |= found.where("MUFU.EX2")
    skipping = found.loop(start, costly)
    assert len(skipping & found.where("HGMMA")) == VERSIONS[version][1]
    votes = skipping & found.where("BAR.RED.AND")
    assert len(votes) == 2  # of which one is for calls with a key mask
    if version in ("demand", "float16", "keys64"):
        asked = found.where("UTMALDG") & whole
        assert asked, "V is asked for by the consumers"
        assert not asked & found.loop(start, costly), "and not if the block is skipped"


def test_dense_attention_has_no_vote(code: Callable[[str], Code]) -> None:
    votes = {name: len(code(name).where("BAR.RED.AND")) for name in ("dense", "always")}
    assert votes == {"dense": 2, "always": 4}  # two each, in calls with a key mask only


@pytest.mark.parametrize("version", VERSIONS)
def test_exponentials_run_beside_the_pending_product(
    code: Callable[[str], Code], version: str
) -> None:
    """They come before the wait for it, which the compiler would move up (see not_before)."""
    found = code(version)
    (scores_done,) = found.where("DEPBAR.LE gsb0, 0x1")
    waits = found.where("DEPBAR.LE gsb0, 0x0")
    before = found.reachable(scores_done, waits)
    exponentials = [i for i in before if "MUFU.EX2" in found.lines[i]]
    # Of a thread's scores in the block; and two, to shrink what is there.
    assert len(exponentials) >= int(VERSIONS[version][0].split(", ")[3]) // 2 + 2


def test_addresses_of_products_are_the_warps(code: Callable[[str], Code]) -> None:
    """Not each thread's own, which would have to be moved before every product."""
    for version in VERSIONS:
        found = code(version)
        assert len(found.where("R2UR")) < 30, version


@pytest.mark.parametrize("version", DECODES)
def test_decode_skips_around_the_wait_for_v_and_its_product(
    code: Callable[[str], Code], version: str
) -> None:
    """The loop over the blocks can be run with K's wait, the scores' product and one barrier."""
    _, scores, values, boxes = DECODES[version]
    found = code(version)
    assert not found.where("LDL", "STL")
    start = min(found.where("HMMA"))
    whole = found.loop(start, set())
    around_v = found.where("LDSM.16.MT88") & whole  # transposed: what V is read with
    assert len(found.where("HMMA") & whole) == scores + values
    assert len(found.where("BAR.SYNC", "BAR.RED") & whole) == 1
    skipping = found.loop(start, around_v | found.where("MUFU.EX2"))
    assert len(found.where("HMMA") & skipping) == scores
    assert len(found.where("BAR.SYNC") & skipping) == 1
    waits, copies = found.where("SYNCS.PHASECHK"), found.where("UTMALDG")
    assert waits & skipping
    assert (waits & whole) - skipping, "V is not waited for where a block is skipped"
    # A block of K comes first; then V after the vote, and V ahead: the loop runs without either.
    in_loop = sorted(copies & whole)
    assert len(in_loop) == boxes + 2 * values_boxes(version)
    lean = found.loop(start, around_v | found.where("MUFU.EX2") | set(in_loop[boxes:]))
    assert sorted(copies & lean) == in_loop[:boxes]


def values_boxes(version: str) -> int:
    """Boxes that a block of V is."""
    return int(DECODES[version][0].split(", ")[2]) // 64
