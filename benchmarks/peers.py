"""What a user would pick instead, as functions of the same tensors: `attend(q, k, v)`, causal.

q is `[B, Hq, Lq, D]`, k and v `[B, Hkv, Lk, D]`; every peer gives `[B, Hq, Lq, D]`. A peer that is
not installed, or cannot serve the dtype, is a reason (a string) instead of a function. Conversions
that a peer's own interface needs (numpy views, `[B, L, H * D]` layouts) are made outside the
function that is timed where the peer allows it, so that a peer is never charged for our layout.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Attend = Callable[[], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Attend:
    """Torch's own, GQA through `enable_gqa`."""
    causal = q.shape[2] > 1
    gqa = q.shape[1] != k.shape[1]
    return lambda: scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)


def sdpa_folded(q: Tensor, k: Tensor, v: Tensor) -> Attend | str:
    """Torch's own in decode, with the GQA group folded into the query length."""
    if q.shape[2] != 1:
        return "folding the group into the query length is for one query"
    batch, heads, _, size = q.shape
    folded = q.reshape(batch, k.shape[1], -1, size)
    return lambda: scaled_dot_product_attention(folded, k, v).reshape(batch, heads, 1, size)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Attend:
    """As transformers' eager attention: scores, float32 softmax, values, all written out."""
    group = q.shape[1] // k.shape[1]
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)

    def attend() -> Tensor:
        keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = q @ keys.transpose(2, 3) * q.shape[-1] ** -0.5 + bias
        return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ values

    return attend


def flex(q: Tensor, k: Tensor, v: Tensor) -> Attend | str:
    """Compiled FlexAttention with a causal block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if q.shape[2] == 1:
        return "compiled FlexAttention decode is not part of this comparison"

    def causal(_batch: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return column <= row

    mask = create_block_mask(causal, None, None, q.shape[2], k.shape[2], device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = q.shape[1] != k.shape[1]

    def attend() -> Tensor:
        with torch.no_grad():
            return compiled(q, k, v, block_mask=mask, enable_gqa=gqa)

    return attend


def openvino(q: Tensor, k: Tensor, v: Tensor) -> Attend | str:
    """OpenVINO's ScaledDotProductAttention operation on its CPU plugin."""
    try:
        import openvino as ov
        from openvino import opset13
    except ImportError:
        return "openvino is not installed"
    if q.shape[1] != k.shape[1]:
        return "OpenVINO's operation takes as many key as query heads"
    types = {torch.float32: ("f32", ov.Type.f32), torch.bfloat16: ("bf16", ov.Type.bf16)}
    if q.dtype not in types:
        return f"no {q.dtype} here"
    precision, element = types[q.dtype]
    inputs = [opset13.parameter(list(x.shape), element) for x in (q, k, v)]
    node = opset13.scaled_dot_product_attention(*inputs, causal=q.shape[2] > 1)
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    model = ov.Core().compile_model(ov.Model([node], inputs), "CPU", options)
    request = model.create_infer_request()
    for i, x in enumerate((q, k, v)):
        raw = x.contiguous()
        raw = raw.view(torch.uint16) if raw.dtype == torch.bfloat16 else raw
        shared = ov.Tensor(raw.numpy(), list(x.shape), element)
        request.set_input_tensor(i, shared)

    def attend() -> Tensor:
        request.infer()
        out = request.get_output_tensor(0)
        if q.dtype == torch.bfloat16:
            data = out.data.view("uint16") if out.element_type == ov.Type.bf16 else out.data
            made = torch.from_numpy(data)
            return made.view(torch.bfloat16) if made.dtype == torch.uint16 else made
        return torch.from_numpy(out.data)

    return attend


def onnxruntime(q: Tensor, k: Tensor, v: Tensor) -> Attend | str:
    """ONNX Runtime's GroupQueryAttention (com.microsoft) on its CPU provider."""
    try:
        import onnx
        import onnxruntime as ort
        from onnx import TensorProto, helper
    except ImportError:
        return "onnx and onnxruntime are not installed"
    if q.dtype != torch.float32:
        return f"its CPU kernel has no {q.dtype}"
    batch, heads, q_len, size = q.shape
    kv_heads, kv_len = k.shape[1:3]
    past = kv_len - q_len
    node = helper.make_node(
        "GroupQueryAttention",
        ["query", "key", "value", "past_key", "past_value", "seqlens_k", "total"],
        ["output", "present_key", "present_value"],
        domain="com.microsoft",
        num_heads=heads,
        kv_num_heads=kv_heads,
    )
    shapes = {
        "query": [batch, q_len, heads * size],
        "key": [batch, q_len, kv_heads * size],
        "value": [batch, q_len, kv_heads * size],
        "past_key": [batch, kv_heads, kv_len, size],
        "past_value": [batch, kv_heads, kv_len, size],
    }
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    inputs.append(helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, [batch]))
    inputs.append(helper.make_tensor_value_info("total", TensorProto.INT32, []))
    present = [batch, kv_heads, kv_len, size]
    outputs = [
        helper.make_tensor_value_info("output", TensorProto.FLOAT, shapes["query"]),
        helper.make_tensor_value_info("present_key", TensorProto.FLOAT, present),
        helper.make_tensor_value_info("present_value", TensorProto.FLOAT, present),
    ]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "attention", inputs, outputs)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])

    def flat(x: Tensor) -> Tensor:
        return x[:, :, past:].transpose(1, 2).reshape(batch, q_len, -1).contiguous()

    # The past lies in buffers of full length that the outputs share, as in its own generate loop.
    keys, values = k.contiguous().clone(), v.contiguous().clone()
    binding = session.io_binding()
    query = q.transpose(1, 2).reshape(batch, q_len, -1).contiguous()
    tensors = {"query": query, "key": flat(k), "value": flat(v)}
    tensors |= {"past_key": keys, "past_value": values}
    tensors["seqlens_k"] = torch.full((batch,), kv_len - 1, dtype=torch.int32)
    tensors["total"] = torch.tensor(kv_len, dtype=torch.int32)
    out = torch.empty_like(query)
    results = {"output": out, "present_key": keys, "present_value": values}
    for bind, group in ((binding.bind_input, tensors), (binding.bind_output, results)):
        for name, x in group.items():
            kind = x.numpy().dtype.type
            bind(name, "cpu", 0, kind, list(x.shape), x.data_ptr())

    def attend() -> Tensor:
        assert tensors, "kept alive here: the binding holds bare addresses"
        session.run_with_iobinding(binding)
        return out.view(batch, q_len, heads, size).transpose(1, 2)

    return attend


PEERS: dict[str, Callable[[Tensor, Tensor, Tensor], Attend | str]] = {
    "sdpa": sdpa,
    "sdpa_folded": sdpa_folded,
    "eager": eager,
    "flex": flex,
    "openvino": openvino,
    "onnxruntime": onnxruntime,
}
