"""What a user of the Hub's kernel relies on, loaded as a user does.

The kernel's numbers are tested against float64 in hf-sparse-attention; here: it loads, it is exact
without a rule, and it skips what it may.
"""

import pytest
import torch
from kernels import get_kernel
from torch.nn.functional import scaled_dot_product_attention

REPO = "hf-sparse-attention/block-skip-attention"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def kernel():
    backend = "cpu" if DEVICE == "cpu" else None  # None: what this torch is built for
    return get_kernel(REPO, version=1, backend=backend, trust_remote_code=[REPO])


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("q_len", [1, 300])
def test_exact_without_a_rule(kernel, dtype: torch.dtype, q_len: int) -> None:
    q, k, v = (randn(2, n, x, 64) for n, x in ((4, q_len), (2, 300), (2, 300)))
    exact = scaled_dot_product_attention(q, k, v, is_causal=q_len > 1, enable_gqa=True)
    out = kernel.forward(q.to(dtype), k.to(dtype), v.to(dtype), scale=0.125)[0]
    # Inputs, weights and output are each rounded to the dtype; scores of a few units carry it
    # further.
    tolerance = max(16 * torch.finfo(dtype).eps, 2e-6)
    torch.testing.assert_close(out.float().transpose(1, 2), exact, rtol=0, atol=tolerance)


@pytest.mark.kernels_ci
def test_skips_what_lies_below_lambda(kernel) -> None:
    q, k, v = randn(1, 2, 512, 64), randn(1, 1, 512, 64), randn(1, 1, 512, 64)
    q[..., 0], k[..., 0] = 10.0, 0.0
    k[:, :, :64, 0] = 20.0  # the first block outweighs all others
    rule = torch.full((1, 1), 1e-3, device=DEVICE).log()
    out, _, counts, _, dropped = kernel.forward(
        q, k, v, log_lambda=rule, scale=0.125, return_dropped_mass=True
    )
    visited, skipped = counts.sum((0, 1)).tolist()
    assert (visited, skipped) == (2 * 36, 2 * 28)
    exact = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert dropped.max() < 1e-3 * 512
    torch.testing.assert_close(out.transpose(1, 2), exact, rtol=0, atol=1e-4)
