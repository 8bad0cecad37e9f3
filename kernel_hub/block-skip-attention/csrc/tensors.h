// From torch's tensors to plain pointers, with checks whose messages say what was expected and what
// came. For the bindings only: compiled once, for any machine.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <limits>
#include <optional>
#include <string>

#include "requests.h"

namespace bsa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline std::string shape(const Tensor& x) {
  std::string s = "[";
  for (int64_t i = 0; i < x.dim(); ++i) s += (i ? ", " : "") + std::to_string(x.size(i));
  return s + "]";
}

// A 4-dimensional input whose last dimension is made contiguous if it is not.
inline Tensor with_dense_rows(const Tensor& x) {
  return x.size(3) > 1 && x.stride(3) != 1 ? torch::stable::contiguous(x) : x;
}

inline Strided strided(const Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

inline void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
                  "q, k, v: expected [batch, heads, length, head size], got ", shape(q), ", ",
                  shape(k), ", ", shape(v));
  STD_TORCH_CHECK(k.size(0) == q.size(0) && v.size(0) == q.size(0) && k.size(1) == v.size(1) &&
                      k.size(2) == v.size(2) && k.size(3) == q.size(3),
                  "q, k, v: expected [B, Hq, Lq, D], [B, Hkv, Lk, D], [B, Hkv, Lk, Dv], got ",
                  shape(q), ", ", shape(k), ", ", shape(v));
  STD_TORCH_CHECK(k.size(1) > 0 ? q.size(1) % k.size(1) == 0 : q.size(1) == 0,
                  "q, k: expected a multiple of the key/value heads (", k.size(1),
                  ") as query heads, got ", q.size(1));
  STD_TORCH_CHECK(q.size(3) >= 1 && q.size(3) <= 512 && v.size(3) >= 1 && v.size(3) <= 512,
                  "head size: expected 1 to 512, got ", q.size(3), " and ", v.size(3));
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                  "q, k, v: expected one dtype for all three");
  STD_TORCH_CHECK(k.size(2) < std::numeric_limits<int32_t>::max(),
                  "k: expected fewer than 2^31 keys, got ", k.size(2));
}

inline void check_geometry(const Problem& p) {
  STD_TORCH_CHECK(p.block_q >= 1 && p.block_q <= kLanes, "block_q: expected 1 to 64, got ",
                  p.block_q);
  STD_TORCH_CHECK(
      p.block_k >= 1 && p.block_k <= 1024 && (64 % p.block_k == 0 || p.block_k % 64 == 0),
      "block_k: expected a divisor of 64, or a multiple of 64 up to 1024, got ", p.block_k);
  STD_TORCH_CHECK(p.window >= 0, "window: expected 0 (none) or more, got ", p.window);
  STD_TORCH_CHECK(std::isfinite(p.scale), "scale: expected a finite number, got ", p.scale);
  STD_TORCH_CHECK(p.softcap >= 0 && std::isfinite(p.softcap),
                  "softcap: expected 0 (none) or more, got ", p.softcap);
}

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, "q, k, v: expected float32, bfloat16 or float16");
  }
}

inline const Level& level() {
  const char* wanted;
  const Level* found = choose_level(&wanted);
  STD_TORCH_CHECK(found,
                  "HF_SPARSE_ATTENTION_CPU_LEVEL: expected portable, avx2, avx512 or avx512_bf16, "
                  "as far as this "
                  "machine has it, got ",
                  wanted);
  return *found;
}

// What every op on a whole attention has in common: checks the arguments, makes them contiguous
// where that is needed, and fills `p` and, beside it, the requests that it points to.
inline Requests fill(Problem& p, Tensor& q, Tensor& k, Tensor& v, MaybeTensor& key_valid,
                     MaybeTensor& q_offset, MaybeTensor& sinks, double scale, bool causal,
                     int64_t window, double softcap, int64_t block_q, int64_t block_k) {
  check_inputs(q, k, v);
  q = with_dense_rows(q), k = with_dense_rows(k), v = with_dense_rows(v);
  p.q = strided(q), p.k = strided(k), p.v = strided(v);
  p.dtype = dtype_of(q);
  p.B = q.size(0), p.Hq = q.size(1), p.Hkv = k.size(1), p.Lq = q.size(2), p.Lk = k.size(2);
  p.D = q.size(3), p.Dv = v.size(3), p.G = p.Hkv ? p.Hq / p.Hkv : 1;
  p.scale = float(scale), p.softcap = float(softcap), p.causal = causal, p.window = window;
  p.block_q = block_q, p.block_k = block_k;
  check_geometry(p);
  p.NQ = p.decode() ? p.Lq : (p.Lq + block_q - 1) / block_q;
  p.NK = (p.Lk + block_k - 1) / block_k;
  p.skip_bytes = (p.NK + 7) / 8;
  if (key_valid) {
    STD_TORCH_CHECK(key_valid->scalar_type() == ScalarType::Bool && key_valid->dim() == 2 &&
                        key_valid->size(0) == p.B && key_valid->size(1) == p.Lk,
                    "key_valid: expected bool [", p.B, ", ", p.Lk, "], got ", shape(*key_valid));
    key_valid = torch::stable::contiguous(*key_valid);
  }
  if (q_offset) {
    STD_TORCH_CHECK(q_offset->scalar_type() == ScalarType::Long && q_offset->dim() == 1 &&
                        (q_offset->size(0) == 1 || q_offset->size(0) == p.B),
                    "q_offset: expected int64 [1] or [", p.B, "], got ", shape(*q_offset));
    q_offset = torch::stable::contiguous(*q_offset);
  }
  if (sinks) {
    STD_TORCH_CHECK(
        sinks->scalar_type() == ScalarType::Float && sinks->dim() == 1 && sinks->size(0) == p.Hq,
        "sinks: expected float32 [", p.Hq, "], got ", shape(*sinks));
    sinks = torch::stable::contiguous(*sinks);
    p.sinks = static_cast<const float*>(sinks->const_data_ptr());
  }
  const auto* valid =
      key_valid ? static_cast<const uint8_t*>(key_valid->const_data_ptr()) : nullptr;
  const auto* offset = q_offset ? static_cast<const int64_t*>(q_offset->const_data_ptr()) : nullptr;
  Requests requests = make_requests(p, valid, offset, offset && q_offset->size(0) == 1);
  p.requests = requests.list.data();
  return requests;
}

}  // namespace bsa
