// The binding of append_int8_keys for CUDA. Where the keys go is read on the device: nothing waits
// for the GPU, and a call can be captured in a CUDA graph.
#include "bindings.h"

using bsa::ScalarType, bsa::Tensor;

void append_int8_keys_cuda(Tensor k, Tensor position, Tensor copy) {
  STD_TORCH_CHECK(k.dim() == 4 && k.size(3) >= 1 && k.size(3) <= 512,
                  "k: expected [batch, heads, new keys, head size 1 to 512], got ", bsa::shape(k));
  STD_TORCH_CHECK(k.size(2) <= 65535 * int64_t(bsa::cuda::kKeysAtOnce),
                  "k: expected up to 4 million new keys, got ", k.size(2));
  STD_TORCH_CHECK(position.scalar_type() == ScalarType::Long && position.numel() == 1 &&
                      position.is_cpu() == k.is_cpu() &&
                      position.get_device_index() == k.get_device_index(),
                  "position: expected one int64 on k's device, got ", bsa::shape(position));
  bsa::cuda::NewKeys keys;
  switch (k.scalar_type()) {
    case ScalarType::Float:
      keys.dtype = bsa::cuda::kFloat32;
      break;
    case ScalarType::Half:
      keys.dtype = bsa::cuda::kFloat16;
      break;
    case ScalarType::BFloat16:
      keys.dtype = bsa::cuda::kBFloat16;
      break;
    default:
      STD_TORCH_CHECK(false, "k: expected float32, bfloat16 or float16");
  }
  keys.copy = bsa::cuda::int8_keys(copy, k, k.size(2));
  keys.B = k.size(0), keys.Hkv = k.size(1), keys.n = k.size(2), keys.D = k.size(3);
  if (keys.B == 0 || keys.Hkv == 0 || keys.n == 0) return;
#if !defined(BSA_EMULATE)
  const torch::stable::accelerator::DeviceGuard guard(k.get_device_index());
#endif
  k = bsa::with_dense_rows(k);
  keys.k = bsa::cuda::strided(k);
  keys.position = static_cast<const int64_t*>(position.const_data_ptr());
  bsa::cuda::append_int8_keys(keys, bsa::cuda::current_stream(k));
}
