// From a prefill to the instance that computes it.
#pragma once
#include "prefill.cuh"
#include "start.h"

namespace bsa::cuda::sm90 {

// Blocks that both block rows of a pair keep are fetched twice on demand, and once always. If each
// keeps a share 1 - s, that is 2 (1 - s) fetches against 1: even at half.
constexpr float kOnDemandFrom = 0.5f;

template <class C>
void launch(const Params& p, void* stream) {
  const auto map = [&](const Strided& x, int heads, int rows, int width, int box) {
    return make_map(x, p.dtype, p.B, heads, rows, width, box, p.q.data);
  };
  const Maps maps = {map(p.q, p.Hq, p.Lq, p.D, kRows), map(p.k, p.Hkv, p.Lk, p.D, C::kBlockK),
                     map(p.v, p.Hkv, p.Lk, p.Dv, C::kBlockK)};
  sm90::start(prefill_kernel<C>, dim3((p.NQ + kPair - 1) / kPair * p.group, p.Hkv, p.B), kThreads,
              Memory<C>::kBytes, stream, maps, p);
}

enum class Version { kDense, kAlways, kOnDemand, kGeneral };

inline Version version_for(const Params& p, bool on_demand_fits, float expected_sparsity) {
  const bool any_rule = p.log_lambda.data || p.threshold.data || p.budget.data;
  if (p.softcap > 0.0f || p.scale <= 0.0f || p.wants_dropped()) return Version::kGeneral;
  if (!any_rule) return Version::kDense;
  return on_demand_fits && expected_sparsity >= kOnDemandFrom ? Version::kOnDemand
                                                              : Version::kAlways;
}

template <class T, int kD, int kDv, int kBlockK>
void choose_version(const Params& p, void* stream, float expected_sparsity) {
  using OnDemand = Config<T, kD, kDv, kBlockK, true, true, false>;
  switch (version_for(p, OnDemand::kFits, expected_sparsity)) {
    case Version::kDense:
      return launch<Config<T, kD, kDv, kBlockK, false, false, false>>(p, stream);
    case Version::kAlways:
      return launch<Config<T, kD, kDv, kBlockK, true, false, false>>(p, stream);
    case Version::kOnDemand:
      if constexpr (OnDemand::kFits) return launch<OnDemand>(p, stream);
      return;
    case Version::kGeneral:
      return launch<Config<T, kD, kDv, kBlockK, true, false, true>>(p, stream);
  }
}

template <class T>
void choose_sizes(const Params& p, void* stream, float expected_sparsity) {
  const bool wide = p.block_k == 128;
  if (p.D == 64 && wide) return choose_version<T, 64, 64, 128>(p, stream, expected_sparsity);
  if (p.D == 64) return choose_version<T, 64, 64, 64>(p, stream, expected_sparsity);
  if (p.D == 128 && wide) return choose_version<T, 128, 128, 128>(p, stream, expected_sparsity);
  if (p.D == 128) return choose_version<T, 128, 128, 64>(p, stream, expected_sparsity);
  if (p.D == 192 && wide) return choose_version<T, 192, 128, 128>(p, stream, expected_sparsity);
  if (p.D == 192) return choose_version<T, 192, 128, 64>(p, stream, expected_sparsity);
  choose_version<T, 256, 256, 64>(p, stream, expected_sparsity);
}

}  // namespace bsa::cuda::sm90
