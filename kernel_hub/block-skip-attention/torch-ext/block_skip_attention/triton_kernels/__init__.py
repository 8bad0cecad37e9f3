"""Block-skipping attention in Triton: for every GPU that has no compiled variant.

`prefill.py`, `decode.py`, `join.py`, `prove.py`, `int8_keys.py`, `backward_q.py` and
`backward_kv.py` hold the kernels, `rules.py` and `backward_weights.py` what they share, and
`launch.py` and `launch_backward.py` start those of attention. Under TRITON_INTERPRET=1 they run on
the CPU, slowly, which is how they are tested without a GPU.
"""

from .int8_keys import append_int8_keys
from .launch import forward, refusal
from .launch_backward import backward

__all__ = ["append_int8_keys", "backward", "forward", "refusal"]
