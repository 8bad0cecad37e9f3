// From products to the weights of the backward: P = exp(s - lse) and
// dS = P (dP - delta) ds/d(q k), with delta = rowsum(dO O) - dlse, for 64 query rows at a time.
#pragma once
#include "backward.h"
#include "units.h"

namespace bsa::BSA_LEVEL {

struct Weight {
  vf p, ds;
};

struct Weights {
  const Backward& p;
  const ScoreUnits units;
  int64_t pos0 = 0;                     // the column of lane 0
  alignas(64) float minus_lse[kLanes];  // in base 2; -infinity for lanes that see nothing
  alignas(64) float delta[kLanes];
  alignas(64) int32_t lane[kLanes];

  explicit Weights(const Backward& p_) : p(p_), units(p_) {
    for (int r = 0; r < kLanes; ++r) lane[r] = r;
  }

  // S and dP of n keys, [n][64], become P and dS.
  void apply(const int64_t* keys, int64_t n, int vectors, float* s, float* dp) const {
    const int64_t last = pos0 + vectors * W - 1;
    const bool edge = (p.causal && keys[n - 1] > pos0) || (p.window && keys[0] <= last - p.window);
    if (edge)
      loop<true>(keys, n, vectors, s, dp);
    else
      loop<false>(keys, n, vectors, s, dp);
  }

 private:
  template <bool edge>
  BSA_PLAIN void loop(const int64_t* keys, int64_t n, int vectors, float* s, float* dp) const {
    for (int64_t x = 0; x < n; ++x)
      for (int j = 0; j < vectors; ++j) {
        float* const here = s + x * kLanes + j * W;
        float* const there = dp + x * kLanes + j * W;
        const Weight w = weight<edge>(keys[x], j, load(here), load(there));
        store(here, w.p), store(there, w.ds);
      }
  }

  template <bool edge>
  BSA_PLAIN Weight weight(int64_t key, int j, vf s, vf dp) const {
    const vf score = ScoreUnits::apply(units, s);
    // A weight is at most 1; rounding must not make huge scores overflow.
    const vf power = score * units.unit + load(minus_lse + j * W);
    Weight w;
    w.p = exp2v(power > 0.0f ? vf{} : power);
    w.ds = w.p * (dp - load(delta + j * W));
    if (units.capped) w.ds *= 1.0f - score * score;
    if (edge) {
      const int64_t own = key - pos0;  // the lane that stands at the key
      const int64_t from = p.causal ? own : 0, to = p.window ? own + p.window : kLanes;
      const vi here = *reinterpret_cast<const vi*>(lane + j * W);
      const vi sees = (here >= clamp(from)) & (here < clamp(to));
      w.p = sees ? w.p : vf{}, w.ds = sees ? w.ds : vf{};
    }
    return w;
  }

  BSA_INLINE vi clamp(int64_t x) { return int32_t(x < 0 ? 0 : x > kLanes ? kLanes : x) - vi{}; }
};

}  // namespace bsa::BSA_LEVEL
