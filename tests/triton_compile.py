"""Compiles the Triton kernels for the targets named, and prints {target: {kernel: assembly}}.

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
    "BY_SCAN": False,
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
MODULES = {"decode_proved": "decode", "append": "int8_keys", "mean": "int8_keys"}
TYPES = {"counts_ptr": "*i32"}
TYPES |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16")
TYPES |= dict.fromkeys(("copy_ptr", "proved_ptr", "request_ptr"), "*i32")
TYPES |= {"position_ptr": "*i64", "valid_ptr": "*i1", "skips_ptr": "*i8"}
TYPES |= dict.fromkeys(("scale", "softcap", "cost"), "fp32")


def assembly(name: str, target: GPUTarget) -> str:
    """The kernel's assembly for `target`, at head size 128 in bfloat16."""
    kernels = sys.modules[triton_source.load().__name__]
    module = sys.modules[f"{kernels.__name__}.{MODULES.get(name, name)}"]
    kernel = getattr(module, f"{name.partition('_')[0]}_kernel")
    constants: dict[str, Any] = {
        key: value
        for key, value in CONSTANTS[name].items()
        if key in kernel.arg_names and value is not ...
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
    found = triton.compile(source, target=target, options={"num_warps": 4}).asm
    return str(found["ptx" if target.backend == "cuda" else "amdgcn"])


def main() -> None:
    found: dict[str, dict[str, str]] = {}
    for text in sys.argv[1:]:
        backend, arch = text.split(":")
        target = GPUTarget(
            backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64
        )
        found[text] = {name: assembly(name, target) for name in CONSTANTS}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
