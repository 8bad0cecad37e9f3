// The kernels of sm_80 for one pair of head sizes; each pair is compiled in a file of its own.
#pragma once
#include "decode_sm80.cuh"
#include "prefill_sm80.cuh"
#include "start.h"

namespace bsa::cuda {

// Of what kind a call is, as far as kernels are compiled apart for it.
template <int kHead, int kValue>
struct Launch {
  static void prefill(const Params& p, Stream stream);
  static void decode(const Params& p, Stream stream);
};

// Calls `run` with the type of the elements of p and a constant for block_k.
template <int kHead, class Run>
void with_kind(const Params& p, Run run) {
  const auto with_type = [&](auto block_k) {
    if (p.dtype == kBFloat16)
      run(BFloat16(), block_k);
    else
      run(Float16(), block_k);
  };
  if constexpr (kHead <= 192)
    if (p.block_k == 128) return with_type(std::integral_constant<int, 128>());
  with_type(std::integral_constant<int, 64>());
}

template <class C>
void start_prefill(const Params& p, Stream stream) {
  start(prefill_kernel<C>, dim3(p.NQ, p.Hq, p.B), kThreads, C::kSharedBytes, stream, p);
}

template <int kHead, int kValue>
void Launch<kHead, kValue>::prefill(const Params& p, Stream stream) {
  with_kind<kHead>(p, [&](auto type, auto block_k) {
    using Type = decltype(type);
    constexpr int kBlockK = decltype(block_k)::value;
    if (p.log_lambda.data || p.threshold.data || p.budget.data)
      start_prefill<Prefill<Type, kHead, kValue, kBlockK, true>>(p, stream);
    else
      start_prefill<Prefill<Type, kHead, kValue, kBlockK, false>>(p, stream);
  });
}

template <int kHead, int kValue>
void Launch<kHead, kValue>::decode(const Params& p, Stream stream) {
  with_kind<kHead>(p, [&](auto type, auto block_k) {
    using C = Decode<decltype(type), kHead, kValue, decltype(block_k)::value>;
    start(decode_kernel<C>, dim3(p.splits, p.Lq * p.Hkv, p.B), kThreads, C::kSharedBytes, stream,
          p);
  });
}

}  // namespace bsa::cuda
