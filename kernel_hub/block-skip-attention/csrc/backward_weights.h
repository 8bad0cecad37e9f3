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

  // Calls body(x, j, at) for each of n keys and `vectors` vectors of lanes; at(key, j, S, dP) gives
  // the weights of vector j.
  template <class Body>
  BSA_PLAIN void each(const int64_t* keys, int64_t n, int vectors, const Body& body) const {
    const int64_t last = pos0 + vectors * W - 1;
    const bool edge = (p.causal && keys[n - 1] > pos0) || (p.window && keys[0] <= last - p.window);
    if (edge)
      loop<true>(n, vectors, body);
    else
      loop<false>(n, vectors, body);
  }

 private:
  template <bool edge, class Body>
  BSA_PLAIN void loop(int64_t n, int vectors, const Body& body) const {
    const auto at = [&](int64_t key, int j, vf s, vf dp)
                        __attribute__((always_inline)) { return weight<edge>(key, j, s, dp); };
    for (int64_t x = 0; x < n; ++x)
      for (int j = 0; j < vectors; ++j) body(x, j, at);
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
