// Rotary position embedding of q and k in place, behind an RMSNorm of each head where the model has
// one: one pass over them in floats, rounded once.
#pragma once
#include "convert.h"

namespace bsa::BSA_LEVEL {

// Row l of head h as the model has it: x <- x * cos + (-x2, x1) * sin, x1 and x2 its halves.
template <class T>
BSA_INLINE void rotate_row(const Rotate& a, T* row, const float* norm, const float* cos,
                           const float* sin) {
  alignas(64) float x[512 + W], y[512 + W];
  const int64_t half = a.D / 2;
  widen(row, a.D, x);
  if (norm) {
    vf sums = {};
    int64_t i = 0;
    for (; i + W <= a.D; i += W) sums += load(x + i) * load(x + i);
    float squares = sum_of(sums);
    for (; i < a.D; ++i) squares += x[i] * x[i];
    const float factor = 1.0f / __builtin_sqrtf(squares / float(a.D) + a.eps);
    for (int64_t d = 0; d < a.D; ++d) x[d] *= factor * norm[d];
  }
  for (int64_t d = 0; d < half; ++d) {
    y[d] = x[d] * cos[d] - x[d + half] * sin[d];
    y[d + half] = x[d + half] * cos[d + half] + x[d] * sin[d + half];
  }
  narrow(y, a.D, row);
}

// Positions [from, to) of all batch items together, every head.
template <class T>
void rotate(const Rotate& a, int64_t from, int64_t to) {
  alignas(64) float cos[512 + W], sin[512 + W];
  for (int64_t i = from; i < to; ++i) {
    const int64_t b = i / a.L, l = i % a.L;
    widen(row_of<T>(a.cos, b, 0, l), a.D, cos);
    widen(row_of<T>(a.sin, b, 0, l), a.D, sin);
    for (int64_t h = 0; h < a.H; ++h) {
      T* const row = const_cast<T*>(row_of<T>(a.x, b, h, l));
      rotate_row(a, row, a.norm ? a.norm + h * a.norm_stride : nullptr, cos, sin);
    }
  }
}

}  // namespace bsa::BSA_LEVEL
