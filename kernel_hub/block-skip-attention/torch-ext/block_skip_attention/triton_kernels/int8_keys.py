"""The int8 copy of K that a caller keeps beside a cache: how keys enter it in Triton.

The layout is that of the CPU's copy (csrc/int8_keys.h), here in words of 4 bytes: a head has rows
of `16 * (width + 12)` words. Row 0 holds the mean, float32 [D], and whether there is one, int32.
Each other row is a chunk of 64 keys: `[width / 4][64]` words, four dimensions of a key together as
k8 + 128, and float32 `[3][64]`: the scale a, and upper bounds on the norms of a k8 and of what it
misses. What follows from them: docs/int8-filter.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .requests import strides
from .rules import INTERPRETED

CHUNK = tl.constexpr(64)
LARGEST_NORM = tl.constexpr(1e18)  # no product of two such numbers overflows
NORM_SLACK = tl.constexpr(1.0001)  # above all rounding of a root of a sum of up to 512 squares
QUANT_SLACK = tl.constexpr(5e-5)  # by how much a value in units of its scale may be off
TINY = tl.constexpr(1e-30)  # what is below it is copied as zeros
_MEAN_KEYS = 1024  # the mean is that of so many of a prompt's keys, evenly spread
_BLOCK_N = 32


@triton.jit
def int8_scale(top):
    """Scale and its inverse for values up to `top` in magnitude; 1 and 0 below TINY.

    With divisions that round to nearest: the ordinary one is off by more than QUANT_SLACK allows.
    """
    whole = top >= TINY
    safe = tl.where(whole, top, 1.0)
    most = safe * 0.0 + 127.0
    return tl.where(whole, tl.div_rn(safe, most), 1.0), tl.where(whole, tl.div_rn(most, safe), 0.0)


@triton.jit
def int8_norm(squares, alpha, inverse, SIZE: tl.constexpr):
    """An upper bound on a norm, from the computed sum of `SIZE` squares in units of the scale."""
    root: tl.constexpr = SIZE**0.5
    bound = alpha * (tl.sqrt(squares) * NORM_SLACK + root * QUANT_SLACK)
    return tl.where(inverse == 0.0, root * TINY * NORM_SLACK, bound)


@triton.jit
def nearest(x):
    """The nearest integer, for |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def read_mean(copy_ptr, dims, HEAD_SIZE: tl.constexpr):
    """The mean of the head whose rows begin at `copy_ptr`; zeros where there is none yet."""
    return tl.load(copy_ptr + dims, mask=dims < HEAD_SIZE, other=0).to(tl.float32, bitcast=True)


@triton.jit
def mean_kernel(
    k_ptr,
    copy_ptr,  # int32, see above
    n,  # keys that make the mean, and how far apart they are
    step,
    kv_heads,
    head_words,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_kd,
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The mean of one head, unless it has one; grid `(B * Hkv,)`."""
    batch = (tl.program_id(0) // kv_heads).to(tl.int64)
    head = (tl.program_id(0) % kv_heads).to(tl.int64)
    copy_ptr += tl.program_id(0).to(tl.int64) * head_words
    k_ptr += batch * stride_kb + head * stride_kh
    dims = tl.arange(0, PADDED_HEAD)
    real = dims < HEAD_SIZE
    if tl.load(copy_ptr + HEAD_SIZE) == 0:
        mean = tl.zeros([PADDED_HEAD], tl.float32)
        for start in range(0, n, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            at = (key * step).to(tl.int64)
            k = tl.load(
                k_ptr + at[:, None] * stride_kl + dims[None, :] * stride_kd,
                mask=(key < n)[:, None] & real[None, :],
                other=0.0,
            )
            mean += tl.sum(k.to(tl.float32), 0)
        mean /= n
        # Any vector will do, but it should be a number.
        mean = tl.where(tl.abs(mean) < LARGEST_NORM, mean, 0.0)
        tl.store(copy_ptr + dims, mean.to(tl.int32, bitcast=True), mask=real)
        tl.store(copy_ptr + HEAD_SIZE, 1)


@triton.jit
def append_kernel(
    k_ptr,
    position_ptr,  # int64, one element
    copy_ptr,  # int32, see above
    n,
    room,  # keys that the copy can hold
    kv_heads,
    head_words,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_kd,
    HEAD_SIZE: tl.constexpr,
    PADDED_HEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_N new keys of one head; grid `(ceil(n / BLOCK_N), B * Hkv)`."""
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    head = (tl.program_id(1) % kv_heads).to(tl.int64)
    copy_ptr += tl.program_id(1).to(tl.int64) * head_words
    new = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = tl.load(position_ptr) + new
    inside = (new < n) & (at >= 0) & (at < room)
    dims = tl.arange(0, PADDED_HEAD)
    real = inside[:, None] & (dims[None, :] < HEAD_SIZE)
    k = tl.load(
        k_ptr
        + batch * stride_kb
        + head * stride_kh
        + new[:, None].to(tl.int64) * stride_kl
        + dims[None, :] * stride_kd,
        mask=real,
        other=0.0,
    )
    x = tl.where(real, k.to(tl.float32) - read_mean(copy_ptr, dims, HEAD_SIZE)[None, :], 0.0)
    top = tl.max(tl.abs(x), 1)
    alpha, inverse = int8_scale(top)
    y = x * inverse[:, None]
    k8 = nearest(y)
    copied = alpha * tl.sqrt(tl.sum(k8 * k8, 1)) * NORM_SLACK
    missed = int8_norm(tl.sum((y - k8) * (y - k8), 1), alpha, inverse, HEAD_SIZE)
    # What is not a number fails both comparisons, and is not known either.
    known = (top < LARGEST_NORM) & (copied < LARGEST_NORM)

    WIDTH: tl.constexpr = (HEAD_SIZE + 3) // 4
    k8 = tl.where(known[:, None], k8, 0.0).to(tl.int32) + 128
    even, odd = tl.split(tl.reshape(k8, [BLOCK_N, PADDED_HEAD // 4, 2, 2]))
    byte0, byte2 = tl.split(even)
    byte1, byte3 = tl.split(odd)
    words = byte0 | (byte1 << 8) | (byte2 << 16) | (byte3 << 24)
    lane = copy_ptr + (1 + at // CHUNK) * (CHUNK * (WIDTH + 3)) + at % CHUNK
    word = tl.arange(0, PADDED_HEAD // 4)
    tl.store(
        lane[:, None] + word[None, :] * CHUNK,
        words,
        mask=inside[:, None] & (word[None, :] < WIDTH),
    )
    lane += WIDTH * CHUNK
    unit = tl.where(known, alpha, 0.0)
    tl.store(lane, unit.to(tl.int32, bitcast=True), mask=inside)
    tl.store(lane + CHUNK, copied.to(tl.int32, bitcast=True), mask=inside)
    tl.store(lane + 2 * CHUNK, missed.to(tl.int32, bitcast=True), mask=inside)


def check_copy(copy: Tensor, k: Tensor, least: int) -> None:
    """That `copy` can be one of at least `least` keys like `k` `[B, Hkv, n, D]`.

    Raises:
        ValueError: it cannot.
    """
    batch, heads, _, size = k.shape
    row = 64 * ((size + 3) // 4 * 4 + 12)
    chunks = -(-least // 64)
    shape = tuple(copy.shape)
    fits = len(shape) == 4 and shape[:2] == (batch, heads) and shape[2] > chunks and shape[3] == row
    good = copy.dtype == torch.uint8 and copy.device == k.device and copy.is_contiguous()
    if not (fits and good):
        raise ValueError(
            f"int8_keys: expected contiguous uint8 [{batch}, {heads}, at least {1 + chunks}, "
            f"{row}] on {k.device}, got {copy.dtype} {list(shape)} on {copy.device}"
        )


def append_int8_keys(k: Tensor, position: Tensor, copy: Tensor) -> None:
    """Enters `k` `[B, Hkv, n, D]` into `copy` at `position` and behind; nothing waits for the GPU.

    What would lie outside of the copy is left out, as `position` is read on the device only.

    Raises:
        ValueError: the arguments do not fit together.
    """
    if k.device.type == "cpu" and not INTERPRETED.value:
        raise ValueError("block_skip_attention (Triton): expected tensors on a GPU, got cpu")
    if k.dim() != 4 or not 1 <= k.shape[3] <= 512:
        raise ValueError(
            f"k: expected [batch, heads, new keys, head size 1 to 512], got {list(k.shape)}"
        )
    if position.dtype != torch.int64 or position.numel() != 1 or position.device != k.device:
        raise ValueError(
            f"position: expected one int64 on {k.device}, got {position.dtype} "
            f"{list(position.shape)} on {position.device}"
        )
    batch, heads, n, size = k.shape
    check_copy(copy, k, n)
    if k.numel() == 0:
        return
    words = copy.view(torch.int32)
    padded = max(16, triton.next_power_of_2(size))
    shape = dict(
        kv_heads=heads,
        head_words=words.shape[2] * words.shape[3],
        HEAD_SIZE=size,
        PADDED_HEAD=padded,
        BLOCK_N=min(_BLOCK_N, triton.next_power_of_2(n), 4096 // padded),
        **strides("k", "bhld", k),
    )
    step = max(1, n // _MEAN_KEYS)
    mean_kernel[(batch * heads,)](k, words, min(n, _MEAN_KEYS), step, **shape)
    room = 64 * (copy.shape[2] - 1)
    grid = (triton.cdiv(n, shape["BLOCK_N"]), batch * heads)
    append_kernel[grid](k, position, words, n, room, **shape)
