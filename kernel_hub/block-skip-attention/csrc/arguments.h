// What a caller may hand over, checked: each message says what was expected and what came. For the
// bindings of every device.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>

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

// Which keys are valid, where queries stand, and sinks, each made contiguous.
inline void check_masks(const Tensor& q, const Tensor& k, MaybeTensor& key_valid,
                        MaybeTensor& q_offset, MaybeTensor& sinks) {
  const int64_t B = q.size(0), Hq = q.size(1), Lk = k.size(2);
  if (key_valid) {
    STD_TORCH_CHECK(key_valid->scalar_type() == ScalarType::Bool && key_valid->dim() == 2 &&
                        key_valid->size(0) == B && key_valid->size(1) == Lk,
                    "key_valid: expected bool [", B, ", ", Lk, "], got ", shape(*key_valid));
    key_valid = torch::stable::contiguous(*key_valid);
  }
  if (q_offset) {
    STD_TORCH_CHECK(q_offset->scalar_type() == ScalarType::Long && q_offset->dim() == 1 &&
                        (q_offset->size(0) == 1 || q_offset->size(0) == B),
                    "q_offset: expected int64 [1] or [", B, "], got ", shape(*q_offset));
    q_offset = torch::stable::contiguous(*q_offset);
  }
  if (sinks) {
    STD_TORCH_CHECK(
        sinks->scalar_type() == ScalarType::Float && sinks->dim() == 1 && sinks->size(0) == Hq,
        "sinks: expected float32 [", Hq, "], got ", shape(*sinks));
    sinks = torch::stable::contiguous(*sinks);
  }
}

inline void check_numbers(double scale, int64_t window, double softcap) {
  STD_TORCH_CHECK(window >= 0, "window: expected 0 (none) or more, got ", window);
  STD_TORCH_CHECK(std::isfinite(scale), "scale: expected a finite number, got ", scale);
  STD_TORCH_CHECK(softcap >= 0 && std::isfinite(softcap),
                  "softcap: expected 0 (none) or more, got ", softcap);
}

inline void check_order(int64_t order, int64_t split_k) {
  STD_TORCH_CHECK(order >= 0 && order <= 2,
                  "order: expected 0 ascending, 1 sink_diagonal or 2 descending, got ", order);
  STD_TORCH_CHECK(split_k >= 1, "split_k: expected at least 1, got ", split_k);
}

// A rule's tensor, float32, each dimension `full` or 1; Rule has data, batch, head and row.
template <class Rule>
Rule rule_tensor(const MaybeTensor& x, const char* name, const Tensor& q,
                 std::initializer_list<int64_t> full) {
  Rule r;
  if (!x) return r;
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float && x->is_cpu() == q.is_cpu(), name,
                  ": expected a float32 tensor on q's device");
  STD_TORCH_CHECK(x->dim() == int64_t(full.size()), name, ": expected ", full.size(),
                  " dimensions, got ", shape(*x));
  int64_t* const strides[] = {&r.batch, &r.head, &r.row};
  int64_t i = 0;
  for (const int64_t size : full) {
    STD_TORCH_CHECK(x->size(i) == size || x->size(i) == 1, name, ": expected size ", size,
                    " or 1 in dimension ", i, ", got ", shape(*x));
    *strides[i] = x->size(i) == 1 ? 0 : x->stride(i);
    ++i;
  }
  r.data = static_cast<const float*>(x->const_data_ptr());
  return r;
}

}  // namespace bsa
