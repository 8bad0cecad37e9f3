"""`optimize_for_cpu`: one call that makes a model fast on this CPU, and proves that it is the same.

A thin composition: our attention, oneDNN's prepacked and int8 matrix products as PyTorch offers
them, a key-value cache with room to grow, the number of threads. Each step is timed here and
now, and left out where it does not pay.
"""

from hf_sparse_attention.optimization.api import optimize_for_cpu
from hf_sparse_attention.optimization.report import CpuOptimization, Difference, StepTaken, Timing

__all__ = ["CpuOptimization", "Difference", "StepTaken", "Timing", "optimize_for_cpu"]
