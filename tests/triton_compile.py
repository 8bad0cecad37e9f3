"""Compiles the Triton kernels for the targets named, and prints {target: {case: assembly}}.

TRITON_INTERPRET=0 python tests/triton_compile.py cuda:90 hip:gfx942
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
import triton_source
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

COMMON = {
    "HEAD_SIZE": 128,
    "VALUE_SIZE": 128,
    "PADDED_HEAD": 128,
    "PADDED_VALUE": 128,
    "BLOCK_K": 64,
    "ORDER": 1,
    "CAUSAL": True,
    "HAS_WINDOW": False,
    "HAS_SOFTCAP": False,
    "KEEP_SINK": True,
    "WANTS_DROPPED": False,
    "stride_qd": 1,
    "stride_kd": 1,
    "stride_vd": 1,
    # Not given: an unpadded call, and only BLASST's rule.
    "valid_ptr": None,
    "request_ptr": None,
    "proved_ptr": None,
    "n_words": None,
    "splits_ptr": None,
    "sinks_ptr": None,
    "threshold_ptr": None,
    "eps_ptr": None,
    "skips_ptr": None,
    "dropped_ptr": None,
}
FIXED_KEYS = {"HEAD_SIZE": 128, "PADDED_HEAD": 128, "BLOCK_N": 32, "stride_kd": 1}
GIVEN = {"proved_ptr": ..., "n_words": ..., "threshold_ptr": ...}
MASKED = {"valid_ptr": ..., "request_ptr": ...}
CONSTANTS = {
    "prefill": {**COMMON, "BLOCK_Q": 64},
    "decode": {**COMMON, "PADDED_GROUP": 16},
    "join": {"VALUE_SIZE": 128, "PADDED_VALUE": 128, "PADDED_SPLITS": 64}
    | {"sinks_ptr": None, "dropped_ptr": None},
    # With an int8 copy of K, and what makes and reads it.
    "decode_proved": {**COMMON, "PADDED_GROUP": 16} | GIVEN | {"skips_ptr": ...},
    "prove": {**COMMON, "PADDED_GROUP": 16, "HAS_WINDOW": True} | GIVEN | MASKED,
    "append": FIXED_KEYS,
    "mean": FIXED_KEYS,
}
# The backward reads the skip bits.
BACKWARD = {key: x for key, x in COMMON.items() if key != "skips_ptr"}
CONSTANTS |= {name: {**BACKWARD, "BLOCK_Q": 64, "DECODE": False} for name in ("dq", "dkv")}


def sizes(name: str, head: int, value: int) -> dict[str, Any]:
    """A kernel's constants at other head sizes."""
    padded = map(triton.next_power_of_2, (head, value))
    names = ("HEAD_SIZE", "VALUE_SIZE", "PADDED_HEAD", "PADDED_VALUE")
    return CONSTANTS[name] | dict(zip(names, (head, value, *padded), strict=True))


def everything(name: str) -> dict[str, Any]:
    """A kernel's constants if all masks, all rules and all results are wanted."""
    given = {key: x for key, x in CONSTANTS[name].items() if x is not None}
    return given | {"HAS_WINDOW": True, "HAS_SOFTCAP": True, "WANTS_DROPPED": True}


#: What is compiled for one target each; a case's name begins with its kernel's.
EXTRAS: dict[str, dict[str, dict[str, Any]]] = {
    "cuda:80": {"prefill, 192 and 128": sizes("prefill", 192, 128)},
    "cuda:90": {f"{x}, everything": everything(x) for x in ("prefill", "decode", "join", "dq")},
    "cuda:100": {"prefill, 256": sizes("prefill", 256, 256)},
    "hip:gfx942": {"prefill, 80": sizes("prefill", 80, 80), "decode, 96": sizes("decode", 96, 96)},
}
MODULES = {"decode_proved": "decode", "append": "int8_keys", "mean": "int8_keys"}
MODULES |= {"dq": "backward_q", "dkv": "backward_kv"}
TYPES = {"counts_ptr": "*i32", "request_ptr": "*i32", "splits_ptr": "*i32"}
TYPES |= {"valid_ptr": "*i1", "skips_ptr": "*u8", "position_ptr": "*i64"}
TYPES |= dict.fromkeys(("copy_ptr", "proved_ptr"), "*i32")
TYPES |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr", "dout_ptr"), "*bf16")
TYPES |= dict.fromkeys(("dq_ptr", "dk_ptr", "dv_ptr"), "*bf16")
TYPES |= dict.fromkeys(("scale", "softcap", "cost"), "fp32")


def assembly(name: str, given: dict[str, Any], target: GPUTarget) -> str:
    """The assembly for `target` of the kernel called `name`, in bfloat16, as it is started."""
    kernels = triton_source.load()
    module = sys.modules[f"{kernels.__name__}.{MODULES.get(name, name)}"]
    kernel = getattr(module, f"{name.partition('_')[0]}_kernel")
    # As start.py has it.
    by_scan = triton.__version__.startswith(("3.6.", "3.7.")) and target.arch == 100
    given = {**given, "BY_SCAN": by_scan}
    constants = {
        key: value for key, value in given.items() if key in kernel.arg_names and value is not ...
    }
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        default = "*fp32" if argument.endswith("_ptr") else "i32"
        signature[argument] = TYPES.get(argument, default)
        if signature[argument].startswith("*") or argument.startswith("stride_"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": 4}
    if name.startswith(("prefill", "decode", "dq", "dkv")):
        largest = max(given["PADDED_HEAD"], given["PADDED_VALUE"])
        started = kernels.start.choices(kernel.fn.__name__, largest, 2, given["BLOCK_K"])[0]
        options = dict(zip(("num_warps", "num_stages"), started, strict=True))
    found = triton.compile(source, target=target, options=options).asm
    return str(found["ptx" if target.backend == "cuda" else "amdgcn"])


def main() -> None:
    found: dict[str, dict[str, str]] = {}
    for text in sys.argv[1:]:
        backend, arch = text.split(":")
        target = GPUTarget(
            backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64
        )
        cases = CONSTANTS | EXTRAS[text]
        found[text] = {x: assembly(x.partition(",")[0], cases[x], target) for x in cases}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
