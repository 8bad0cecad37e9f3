// From torch's tensors to plain pointers, with checks whose messages say what was expected and what
// came. For the bindings only: compiled once, for any machine.
#pragma once
#include "arguments.h"
#include "requests.h"

namespace bsa {

inline Strided strided(const Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

inline void check_geometry(const Problem& p) {
  STD_TORCH_CHECK(p.block_q >= 1 && p.block_q <= kLanes, "block_q: expected 1 to 64, got ",
                  p.block_q);
  STD_TORCH_CHECK(
      p.block_k >= 1 && p.block_k <= 1024 && (64 % p.block_k == 0 || p.block_k % 64 == 0),
      "block_k: expected a divisor of 64, or a multiple of 64 up to 1024, got ", p.block_k);
  check_numbers(p.scale, p.window, p.softcap);
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
  const char *wanted, *refusal;
  const Level* found = choose_level(&wanted, &refusal);
  STD_TORCH_CHECK(found,
                  "HF_SPARSE_ATTENTION_CPU_LEVEL: expected portable, avx2, avx512, avx512_bf16 or "
                  "avx512_amx, as far as this machine has it, got ",
                  wanted, refusal ? ": " : "", refusal ? refusal : "");
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
  check_masks(q, k, key_valid, q_offset, sinks);
  if (sinks) p.sinks = static_cast<const float*>(sinks->const_data_ptr());
  const auto* valid =
      key_valid ? static_cast<const uint8_t*>(key_valid->const_data_ptr()) : nullptr;
  const auto* offset = q_offset ? static_cast<const int64_t*>(q_offset->const_data_ptr()) : nullptr;
  Requests requests = make_requests(p, valid, offset, offset && q_offset->size(0) == 1);
  p.requests = requests.list.data();
  return requests;
}

}  // namespace bsa
