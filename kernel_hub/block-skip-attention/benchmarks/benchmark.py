"""`kernels benchmark`: dense causal prefill and decode, verified against torch's own attention.

Comparisons with skipping, and with other implementations: benchmarks/cpu_attention.py in
hf-sparse-attention.
"""

import torch
from kernels.benchmark import Benchmark
from torch.nn.functional import scaled_dot_product_attention


class BlockSkipAttention(Benchmark):
    """8 heads of size 64: 1024 tokens at once, then one token against 8192."""

    seed = 0

    def setup_prefill(self) -> None:
        """1024 queries and keys."""
        self.q, self.k, self.v = (torch.randn(1, 8, 1024, 64, device=self.device) for _ in range(3))

    def benchmark_prefill(self) -> None:
        """One call."""
        self.out = self.kernel.forward(self.q, self.k, self.v, scale=0.125)[0]

    def verify_prefill(self) -> torch.Tensor:
        """What `out` should be."""
        exact = scaled_dot_product_attention(self.q, self.k, self.v, is_causal=True)
        return exact.transpose(1, 2)

    def setup_decode(self) -> None:
        """One query, 8192 keys, two key/value heads."""
        self.q = torch.randn(1, 8, 1, 64, device=self.device)
        self.k, self.v = (torch.randn(1, 2, 8192, 64, device=self.device) for _ in range(2))

    def benchmark_decode(self) -> None:
        """One call."""
        self.out = self.kernel.forward(self.q, self.k, self.v, scale=0.125)[0]

    def verify_decode(self) -> torch.Tensor:
        """What `out` should be."""
        exact = scaled_dot_product_attention(self.q, self.k, self.v, enable_gqa=True)
        return exact.transpose(1, 2)
