// The binding of append_int8_keys, and the checks of a copy that forward shares with it.
#include "int8_keys_cpu.h"

#include "../torch-ext/torch_binding.h"
#include "forward.h"

namespace bsa {

Int8Keys int8_keys(const Tensor& copy, int64_t B, int64_t Hkv, int64_t D, int64_t least) {
  const int64_t bytes = Int8Keys::chunk_bytes(D), chunks = (least + kLanes - 1) / kLanes;
  STD_TORCH_CHECK(copy.is_cpu() && copy.scalar_type() == ScalarType::Byte && copy.dim() == 4 &&
                      copy.size(0) == B && copy.size(1) == Hkv && copy.size(2) > chunks &&
                      copy.size(3) == bytes && copy.is_contiguous(),
                  "int8_keys: expected contiguous uint8 [", B, ", ", Hkv, ", at least ", 1 + chunks,
                  ", ", bytes, "] on the CPU, got ", shape(copy));
  auto* data = static_cast<uint8_t*>(const_cast<void*>(copy.const_data_ptr()));
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % alignof(float) == 0,
                  "int8_keys: expected memory aligned to 4 bytes");
  return Int8Keys(data, copy.size(2) - 1, D);
}

}  // namespace bsa

using bsa::Tensor;

void append_int8_keys_cpu(Tensor k, Tensor position, Tensor copy) {
  STD_TORCH_CHECK(k.dim() == 4 && k.size(3) >= 1 && k.size(3) <= 512,
                  "k: expected [batch, heads, new keys, head size 1 to 512], got ", bsa::shape(k));
  STD_TORCH_CHECK(
      position.scalar_type() == bsa::ScalarType::Long && position.is_cpu() && position.numel() == 1,
      "position: expected one int64 on the CPU, got ", bsa::shape(position));
  k = bsa::with_dense_rows(k);
  bsa::NewKeys keys;
  keys.k = bsa::strided(k), keys.dtype = bsa::dtype_of(k);
  keys.B = k.size(0), keys.Hkv = k.size(1), keys.n = k.size(2), keys.D = k.size(3);
  keys.start = *static_cast<const int64_t*>(position.const_data_ptr());
  STD_TORCH_CHECK(keys.start >= 0, "position: expected 0 or more, got ", keys.start);
  keys.copy = bsa::int8_keys(copy, keys.B, keys.Hkv, keys.D, keys.start + keys.n);
  bsa::run_append(keys, bsa::level());
}
