// The int8 copy of K: keys enter it, and it proves skips. One source for all GPUs.
#include "prove.cuh"
#include "start.h"

namespace bsa::cuda {

namespace {

// Bytes of K; an H200 should read them in 4 us. With fewer, a further kernel would take longer than
// what it can save. That is an estimate, nothing measured; under the emulator all may be tested.
#if defined(BSA_EMULATE)
constexpr int64_t kLeastBytes = 0;
#else
constexpr int64_t kLeastBytes = 16 << 20;
#endif

template <class Type>
void append(const NewKeys& a, Stream stream) {
  const int groups = (a.n + kKeysAtOnce - 1) / kKeysAtOnce;
  if (groups > 1) start(mean_kernel<Type>, dim3(a.B * a.Hkv), kThreads, 0, stream, a);
  start(append_kernel<Type>, dim3(a.B * a.Hkv, groups), kThreads, 0, stream, a);
}

template <class Type>
void prove(const Params& p, Stream stream) {
  const auto kernel = p.D <= 64    ? prove_kernel<Type, 64>
                      : p.D <= 128 ? prove_kernel<Type, 128>
                      : p.D <= 192 ? prove_kernel<Type, 192>
                                   : prove_kernel<Type, 256>;
  start(kernel, dim3(p.splits, p.Lq * p.Hkv, p.B), kThreads, 0, stream, p);
}

}  // namespace

void append_int8_keys(const NewKeys& a, Stream stream) {
  if (a.dtype == kFloat32) return append<Float32>(a, stream);
  a.dtype == kBFloat16 ? append<BFloat16>(a, stream) : append<Float16>(a, stream);
}

bool may_prove(const Params& p) {
  // Scores are then neither too large nor too small for their numbers: products are below 3e36.
  const bool plain = p.softcap == 0 && p.scale >= 1e-4f && p.scale <= 64.0f;
  const int64_t listed = int64_t(p.B) * p.Hkv * p.Lq * p.splits * (1 + p.split_blocks);
  return p.int8_keys.data && listed < (int64_t(1) << 31) && p.decode() &&
         (p.log_lambda.data || p.threshold.data) && !p.wants_dropped() && plain &&
         p.order == kSinkDiagonal && 2 * int64_t(p.B) * p.Hkv * p.Lk * p.D >= kLeastBytes;
}

void prove_skips(const Params& p, Stream stream) {
  p.dtype == kBFloat16 ? prove<BFloat16>(p, stream) : prove<Float16>(p, stream);
}

}  // namespace bsa::cuda
