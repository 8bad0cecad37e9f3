"""The shapes that the ops return, for tracing, and their gradients; registered on import."""

from collections.abc import Callable
from typing import Any

import torch

from ._ops import add_op_namespace_prefix, ops
from .choice import triton_op_name, triton_ops

_DECODE_MAX_QUERIES = 8


# allow_override: the module may be imported twice, from two paths that hold the same build.
@torch.library.register_fake(add_op_namespace_prefix("append_int8_keys"), allow_override=True)
def _append_fake(_k, _position, _copy):
    return None


@torch.library.register_fake(add_op_namespace_prefix("rotate_"), allow_override=True)
def _rotate_fake(_x, _cos, _sin, _norm, _eps):
    return None


def _forward_fake(q, k, v, *args):
    # The schema's order; rules and masks do not change any shape.
    block_q, block_k, return_skips, return_dropped_mass = args[10], args[11], args[15], args[16]
    batch, heads, q_len, _ = q.shape
    kv_heads, kv_len, v_dim = k.shape[1], k.shape[2], v.shape[3]
    skips = q.new_empty((0,), dtype=torch.uint8)
    if return_skips:  # only then do shapes depend on the phase
        decode = q_len <= _DECODE_MAX_QUERIES and kv_len > q_len
        rows = q_len if decode else (q_len + block_q - 1) // block_q
        blocks = (kv_len + block_k - 1) // block_k
        skips = q.new_empty(
            (batch, kv_heads if decode else heads, rows, (blocks + 7) // 8), dtype=torch.uint8
        )
    dropped = (batch, heads, q_len) if return_dropped_mass else (0,)
    return (
        q.new_empty((batch, q_len, heads, v_dim)),
        q.new_empty((batch, heads, q_len), dtype=torch.float32),
        q.new_empty((batch, heads, 2), dtype=torch.int64),
        skips,
        q.new_empty(dropped, dtype=torch.float32),
    )


@torch.library.register_fake(add_op_namespace_prefix("observe"), allow_override=True)
def _observe_fake(q, k, v, *args):
    kept, group_count, eps, bins = args[5], args[8], args[9], args[10]
    _, heads, length, _ = q.shape
    (n, levels), kv_heads, width = kept.shape, k.shape[1], 2 * bins + 1 + eps.shape[0]
    return (
        q.new_empty((1, length, heads, v.shape[3])),
        q.new_empty((n, heads, width), dtype=torch.int64),
        q.new_empty((n, group_count, kv_heads, width), dtype=torch.int64),
        q.new_empty((n, levels, heads, length // 64), dtype=torch.float32),
        q.new_empty((n, levels, kv_heads, length // 64), dtype=torch.float32),
    )


def _backward_fake(*args):
    q, k, v, sinks = (*args[2:5], args[10])
    gradients = [x.new_empty(x.shape) for x in (q, k, v)]
    heads = 0 if sinks is None else q.shape[1]
    return (*gradients, q.new_empty((heads,), dtype=torch.float32))


def _save_for_backward(ctx, inputs, output):
    q, k, v, key_valid, q_offset, sinks, *rules = inputs[:9]
    return_skips = inputs[18]
    out, lse, counts, skips, dropped_mass = output
    if not return_skips and any(rule is not None for rule in rules):
        raise ValueError(
            "forward: expected return_skips=True where gradients are wanted, got False"
        )
    ctx.save_for_backward(q, k, v, out, lse, skips, key_valid, q_offset, sinks)
    ctx.options = inputs[9:15]  # scale to block_k
    ctx.mark_non_differentiable(counts, skips, dropped_mass)
    ctx.set_materialize_grads(False)


def _refuse_second_backward(ctx, *grads):
    raise NotImplementedError(
        "block-skipping attention: second derivatives (create_graph=True) are not implemented in "
        "the kernels; backend='reference' has them"
    )


def _register(ops: Any, name_of: Callable[[str], str]) -> None:
    """For the `forward` and the `backward` of `ops`, whose full names `name_of` gives."""
    torch.library.register_fake(name_of("forward"), _forward_fake, allow_override=True)
    torch.library.register_fake(name_of("backward"), _backward_fake, allow_override=True)
    if hasattr(ops, "_is_differentiable"):  # the module may be imported twice
        return

    def backward(ctx, dout, dlse, *_):
        *tensors, sinks = ctx.saved_tensors
        out = tensors[3]
        if dout is None:
            dout = torch.zeros_like(out)
        dq, dk, dv, dsinks = ops.backward(dout, dlse, *tensors, sinks, *ctx.options)
        return dq, dk, dv, None, None, None if sinks is None else dsinks, *[None] * 16

    torch.library.register_autograd(name_of("forward"), backward, setup_context=_save_for_backward)
    torch.library.register_autograd(name_of("backward"), _refuse_second_backward)
    ops._is_differentiable = True


_register(ops, add_op_namespace_prefix)
if triton_ops is not None:
    _register(triton_ops, triton_op_name)
