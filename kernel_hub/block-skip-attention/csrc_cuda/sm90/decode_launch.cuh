// From a decode to the instance that computes it.
#pragma once
#include "decode.cuh"
#include "start.h"

namespace bsa::cuda::sm90 {

// How deep the rings are, by whether every thread block has a multiprocessor for itself.
template <class C>
Rings rings_of(const Params& p, float expected_sparsity, int processors) {
  const bool any_rule = p.log_lambda.data || p.threshold.data || p.budget.data;
  const bool alone = int64_t(p.splits) * p.Lq * p.Hkv * p.B <= processors;
  return {{alone ? C::kDeepKeyBits : C::kKeyBits},
          {alone ? C::kDeepValueBits : C::kValueBits},
          any_rule ? 2 * expected_sparsity : 0.0f};
}

template <class C>
void launch_decode(const Params& p, void* stream, const Rings& rings) {
  const auto map = [&](const Strided& x, int width) {
    return make_map(x, p.dtype, p.B, p.Hkv, p.Lk, width, C::kBlockK, p.q.data);
  };
  sm90::start(decode_kernel<C>, dim3(p.splits, p.Lq * p.Hkv, p.B), cuda::kThreads,
              C::bytes(rings.keys.bits, rings.values.bits), stream, {map(p.k, p.D), map(p.v, p.Dv)},
              p, rings);
}

// The smallest pair of head sizes that p fits into: the copy engine brings zeros for the rest.
template <class T>
void choose_decode(const Params& p, void* stream, float expected_sparsity, int processors) {
  const auto run = [&](auto head, auto value, auto block_k) {
    using C = Decode<T, decltype(head)::value, decltype(value)::value, decltype(block_k)::value>;
    launch_decode<C>(p, stream, rings_of<C>(p, expected_sparsity, processors));
  };
  constexpr std::integral_constant<int, 64> k64;
  constexpr std::integral_constant<int, 128> k128;
  constexpr std::integral_constant<int, 192> k192;
  constexpr std::integral_constant<int, 256> k256;
  const bool wide = p.block_k == 128;
  if (p.D <= 64 && p.Dv <= 64) return wide ? run(k64, k64, k128) : run(k64, k64, k64);
  if (p.D <= 128 && p.Dv <= 128) return wide ? run(k128, k128, k128) : run(k128, k128, k64);
  if (p.D <= 192 && p.Dv <= 128) return wide ? run(k192, k128, k128) : run(k192, k128, k64);
  run(k256, k256, k64);
}

}  // namespace bsa::cuda::sm90
