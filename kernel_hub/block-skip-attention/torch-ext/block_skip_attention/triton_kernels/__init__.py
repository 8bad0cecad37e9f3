"""Block-skipping attention in Triton: for every GPU that has no compiled variant.

`prefill.py` and `decode.py` hold the kernels, `rules.py` what they share, `launch.py` the op. Under
TRITON_INTERPRET=1 they run on the CPU, slowly, which is how they are tested without a GPU.
"""

from .launch import forward, refusal

__all__ = ["forward", "refusal"]
