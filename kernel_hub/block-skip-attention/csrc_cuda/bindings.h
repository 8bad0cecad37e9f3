// What the bindings for CUDA share: from tensors to pointers and strides, and the stream.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include "../csrc/arguments.h"
#include "../torch-ext/torch_binding.h"
#include "launch.h"

// Weak, so that the library loads beside a torch without CUDA: its schema and fakes work there.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device,
                                                                            void** stream);

namespace bsa::cuda {

inline Stream current_stream([[maybe_unused]] const Tensor& x) {
  void* stream = nullptr;
#if !defined(BSA_EMULATE)
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "block_skip_attention: torch has no CUDA");
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream) == 0,
                  "block_skip_attention: torch does not say what its current stream is");
#endif
  return stream;
}

inline Strided strided(const Tensor& x) {
  Strided s;
  s.data = x.const_data_ptr();
  s.batch = x.stride(0), s.head = x.stride(1), s.row = x.stride(2);
  return s;
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// An int8 copy of keys [B, Hkv, least or more, D].
inline Int8Keys int8_keys(const Tensor& copy, const Tensor& k, int64_t least) {
  const int64_t width = (k.size(3) + 3) / 4 * 4, chunks = (least + 63) / 64;
  STD_TORCH_CHECK(
      copy.scalar_type() == ScalarType::Byte && copy.dim() == 4 && copy.size(0) == k.size(0) &&
          copy.size(1) == k.size(1) && copy.size(2) > chunks && copy.size(3) == 64 * (width + 12) &&
          copy.is_contiguous() && copy.is_cpu() == k.is_cpu() &&
          copy.get_device_index() == k.get_device_index(),
      "int8_keys: expected contiguous uint8 [", k.size(0), ", ", k.size(1), ", at least ",
      1 + chunks, ", ", 64 * (width + 12), "] on k's device, got ", shape(copy));
  Int8Keys found;
  found.data = static_cast<uint8_t*>(const_cast<void*>(copy.const_data_ptr()));
  found.chunks = int32_t(copy.size(2) - 1), found.width = int32_t(width);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(found.data) % 16 == 0,
                  "int8_keys: expected memory aligned to 16 bytes");
  return found;
}

}  // namespace bsa::cuda
