"""The Triton kernels compiled for GPUs that are not here: they compile, and a skip is a branch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton_compile

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, str]]:
    """By target: the assembly of each kernel. Another process: here, kernels are interpreted."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("triton_compile.py")), *TARGETS],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_a_gpu(compiled: dict[str, dict[str, str]], target: str) -> None:
    expected = triton_compile.CONSTANTS | triton_compile.EXTRAS[target]
    assert set(compiled[target]) == set(expected)
    assert all(compiled[target].values())


PRODUCTS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "v_mfma")
EXPONENTIALS = ("ex2.approx", "v_exp_f32")
LOADS = ("ld.global", "cp.async.cg", "cp.async.ca", "global_load")
BYTES = ("ld.global.b8", "global_load_ubyte")  # how skip bits are read

#: A jump: its condition, if any, and where it goes.
PTX_JUMP = re.compile(r"(@!?%p\d+\s+)?(?:bra(?:\.uni)?\s+(\S+);|ret;)")
AMD_JUMP = re.compile(r"s_(?:c?branch(_\w+)?\s+(\S+)|endpgm)")


class Flow:
    """The basic blocks of one function, PTX or AMD's assembly, and which jumps to which."""

    def __init__(self, assembly: str) -> None:
        jump = AMD_JUMP if "s_endpgm" in assembly else PTX_JUMP
        self.blocks: list[list[str]] = [[]]
        names: dict[str, int] = {}
        for line in map(str.strip, assembly.splitlines()):
            if label := re.match(r"([$.]\w+):", line):
                self.blocks.append([])
                names[label[1]] = len(self.blocks) - 1
                continue
            self.blocks[-1].append(line)
            if jump.match(line):
                self.blocks.append([])
        self.next: list[set[int]] = []
        for i, block in enumerate(self.blocks):
            end = jump.match(block[-1]) if block else None
            targets = {names[end[2]]} if end and end[2] else set()
            if (end is None or end[1]) and i + 1 < len(self.blocks):
                targets.add(i + 1)
            self.next.append(targets)

    def counts(self, blocks: set[int], words: tuple[str, ...]) -> int:
        return sum(word in line for i in blocks for line in self.blocks[i] for word in words)

    def holding(self, words: tuple[str, ...]) -> set[int]:
        return {i for i in range(len(self.blocks)) if self.counts({i}, words)}

    def reachable(self, start: int, avoiding: set[int]) -> set[int]:
        found: set[int] = set()
        todo = [start]
        while todo:
            new = self.next[todo.pop()] - found - avoiding
            found |= new
            todo += new
        return found

    def loop_through(self, words: tuple[str, ...], avoiding: set[int]) -> set[int]:
        """The blocks of a loop that holds one of `words` and none of `avoiding`."""
        for i in self.holding(words) - avoiding:
            if i in (there := self.reachable(i, avoiding)):
                return {j for j in there if i in self.reachable(j, avoiding)}
        return set()


@pytest.mark.parametrize(
    ("target", "kernel"),
    [(target, kernel) for target in TARGETS for kernel in ("prefill", "decode")]
    + [(target, "decode_proved") for target in ("cuda:80", "cuda:90")],
)
def test_a_skip_goes_around_the_exponentials_the_load_of_v_and_its_product(
    compiled: dict[str, dict[str, str]], target: str, kernel: str
) -> None:
    """The loop over the blocks can be run with the scores' product alone."""
    flow = Flow(compiled[target][kernel])
    exponentials = flow.holding(EXPONENTIALS)
    assert exponentials
    whole = flow.loop_through(PRODUCTS, set())
    skipping = flow.loop_through(PRODUCTS, exponentials)
    assert skipping, "no way through the loop without exponentials"
    products, loads = (flow.counts(whole, words) for words in (PRODUCTS, LOADS))
    assert 0 < flow.counts(skipping, PRODUCTS) < products, "the scores' product, not that with V"
    bit = int(kernel == "decode_proved")  # which says whether K needs to be loaded
    assert 0 < flow.counts(skipping, LOADS) - bit <= (loads - bit) / 2, "K is loaded, V is not"


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
def test_what_is_proved_goes_around_k_too(compiled: dict[str, dict[str, str]], target: str) -> None:
    """With an int8 copy, the loop can be run without any product, and reading a bit alone."""
    for kernel, reads in (("decode", 0), ("decode_proved", 1)):
        flow = Flow(compiled[target][kernel])
        everything = set(range(len(flow.blocks)))
        products = {i for i in everything if flow.counts({i}, PRODUCTS)}
        loop = flow.loop_through(LOADS, products)
        assert flow.counts(loop, LOADS) == reads, kernel


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
def test_the_proof_runs_on_int8_tensor_cores_and_can_be_given_up(
    compiled: dict[str, dict[str, str]], target: str
) -> None:
    flow = Flow(compiled[target]["prove"])
    everything = set(range(len(flow.blocks)))
    int8 = {i for i in everything if flow.counts({i}, ("m16n8k32.row.col",))}
    assert int8
    loop = flow.loop_through(("m16n8k32.row.col",), set())
    other = (everything - loop) | int8
    around = {i for i in loop - int8 if i in flow.reachable(i, other)}
    assert around, "a block can be passed over"
    assert not flow.counts(around, LOADS), "without reading the copy"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", ["dq", "dkv"])
def test_the_backward_goes_around_everything_where_the_forward_skipped(
    compiled: dict[str, dict[str, str]], target: str, kernel: str
) -> None:
    """The loop can be run by reading the skip bits alone."""
    flow = Flow(compiled[target][kernel])
    whole = flow.loop_through(PRODUCTS, set())
    assert flow.counts(whole, BYTES)
    skipping = flow.loop_through(BYTES, flow.holding(PRODUCTS) | flow.holding(EXPONENTIALS))
    assert skipping, "no way through the loop without products"
    assert flow.counts(skipping, LOADS) == flow.counts(skipping, BYTES), "nothing else is loaded"
