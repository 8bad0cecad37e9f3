"""Block-skipping attention in Triton: for every GPU that has no compiled variant.

`prefill.py`, `decode.py`, `join.py`, `backward_q.py` and `backward_kv.py` hold the kernels,
`rules.py` and `backward_weights.py` what they share, and `launch.py` and `launch_backward.py` start
them. Under TRITON_INTERPRET=1 they run on the CPU, slowly, which is how they are tested without a
GPU.
"""

from .launch import forward, refusal
from .launch_backward import backward

__all__ = ["backward", "forward", "refusal"]
