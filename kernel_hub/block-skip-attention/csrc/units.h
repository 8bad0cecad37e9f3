// From products to base-2 logarithms, in two steps of which the second is left to the exponential.
#pragma once
#include "simd.h"

namespace bsa::BSA_LEVEL {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// How raw products become scores: S = product * before, or tanh of it, and `unit` leads on to
// base-2 logarithms.
struct ScoreUnits {
  float before = 1.0f, unit;
  bool capped = false;
  explicit ScoreUnits(const Problem& p) {
    if (p.softcap > 0) {
      before = p.scale / p.softcap, unit = p.softcap * kLog2e, capped = true;
    } else if (p.scale > 0) {
      unit = p.scale * kLog2e;
    } else {  // a unit must be positive, so such a scale is applied to the products
      before = p.scale, unit = kLog2e;
    }
  }
  bool trivial() const { return !capped && before == 1.0f; }
  BSA_INLINE vf apply(const ScoreUnits& u, vf s) {
    return u.capped ? tanhv(s * u.before) : s * u.before;
  }
};

}  // namespace bsa::BSA_LEVEL
