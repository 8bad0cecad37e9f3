// Counting blocks by their gap, and simulating the budget, for the votes of one block row.
#pragma once
#include "observe.h"
#include "units.h"

namespace bsa::BSA_LEVEL {

// Lane y of the result is the max of vector y of the W at `rows`.
template <int H>
BSA_INLINE void fold_rows(vf* x) {  // from groups of 2 H lanes a row to groups of H
  vi low, high;
  for (int i = 0; i < W; ++i) {
    low[i] = i % (2 * H) < H ? i : W + i - H;
    high[i] = low[i] + H;
  }
  for (int y = 0; y < H; ++y)
    x[y] = vmax(__builtin_shuffle(x[y], x[y + H], low), __builtin_shuffle(x[y], x[y + H], high));
  if constexpr (H > 1) fold_rows<H / 2>(x);
}
BSA_INLINE vf max_of_rows(const float* rows) {
  vf x[W];
  for (int y = 0; y < W; ++y) x[y] = load(rows + y * W);
  fold_rows<W / 2>(x);
  return x[0];
}

BSA_INLINE float max_of(vf x) {
  float top = x[0];
  for (int i = 1; i < W; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

struct Tally {
  int32_t count[kMaxBins];
  float mass[kMaxBins];
  int64_t visited, skipped[kMaxEps];  // under the budget

  void clear(const Observe& o) {
    memset(count, 0, o.bins * sizeof(count[0]));
    memset(mass, 0, o.bins * sizeof(mass[0]));
    visited = 0;
    memset(skipped, 0, sizeof(skipped));
  }

  void add(int bin, float share) { ++count[bin], mass[bin] += share; }

  void flush(const Observe& o, int64_t weight, int64_t* to) const {
    const auto enter = [](int64_t* at, int64_t x) {
      if (x) __atomic_fetch_add(at, x, __ATOMIC_RELAXED);
    };
    const double units = 1.0 / o.mass_unit;
    for (int64_t i = 0; i < o.bins; ++i) {
      if (!count[i]) continue;
      enter(to + i, count[i]);
      // A share is at most 1; NaN counts as none.
      const double x = double(mass[i]) * units;
      enter(to + o.bins + i, x > 0 && x < 9e18 ? __builtin_llrint(x) : 0);
    }
    enter(to + 2 * o.bins, weight * visited);
    for (int64_t e = 0; e < o.eps_count; ++e) enter(to + 2 * o.bins + 1 + e, weight * skipped[e]);
  }
};

// From gaps in score units to bins: (gap * nat + ln L - u_min) * bins_per_nat.
struct Bins {
  float nat, shift, per_nat;
  int32_t last;

  Bins(const Observe& o, float unit, int64_t kv_len)
      : nat(unit * kLn2),
        shift(__builtin_logf(float(kv_len)) - o.u_min),
        per_nat(o.bins_per_nat),
        last(int32_t(o.bins - 1)) {}

  vi of(vf gap) const {
    vf u = (gap * nat + shift) * per_nat;
    u = u < 0.0f ? vf{} : u;
    u = u > float(last - 1) ? splat(float(last - 1)) : u;
    return gap < 0.0f ? __builtin_convertvector(u, vi) : last - vi{};  // NaN too
  }
  int of(float gap) const { return of(splat(gap))[0]; }
};

// The key before which the split of block j ends, as in decode_decide.h.
BSA_INLINE int64_t end_of_split(int64_t j, int64_t block_k, int64_t split_k) {
  return ((j * block_k / split_k + 1) * split_k + block_k - 1) / block_k;
}

}  // namespace bsa::BSA_LEVEL
