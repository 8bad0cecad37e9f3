// An int8 copy of K, with which the filter of prefill proves that keys are too far below the
// running max to matter, at a quarter of what their exact scores cost in float.
//
// Keys are copied in chunks of 64, relative to a vector `mean` that all keys of a head share: most
// of a key is common to all of them, moves every score of a query alike, and would waste the eight
// bits. With k = mean + alpha k8 + e, a chunk keeps its scale alpha, and upper bounds on the norms
// of e and of alpha k8 over its keys. docs/int8-filter.md proves what follows from them.
#pragma once
#include "convert.h"

namespace bsa::BSA_LEVEL {

// Norms are sums of D floats and a square root: 1.0001 is above all of their rounding for D <= 512.
constexpr float kNormSlack = 1.0001f;
// By how much x = fl(fl(k - mean) * fl(127 / max)) may miss (k - mean) / alpha, |x| <= 127.
constexpr float kQuantSlack = 5e-5f;
constexpr float kTiny = 1e-30f;  // a chunk below this is copied as zeros

// The scale of `n` values, largest magnitude `top`, in int8; and its inverse, 0 for `kTiny`.
struct Int8Scale {
  float alpha = 1.0f, inverse = 0.0f;
  explicit Int8Scale(float top) {
    if (top >= kTiny) alpha = top / 127.0f, inverse = 127.0f / top;
  }
  // An upper bound on a norm from the sum of squares in units of alpha.
  float norm(float squares, int64_t n) const {
    const float root = __builtin_sqrtf(float(n));
    if (inverse == 0.0f) return root * kTiny * kNormSlack;
    return alpha * (__builtin_sqrtf(squares) * kNormSlack + root * kQuantSlack);
  }
};

#if BSA_ISA >= 3
template <class T>
void mean_of_head(const Problem& p, int64_t bh) {
  const Request& rq = p.requests[bh / p.Hkv];
  float* mean = p.planes.mean + bh * p.D;
  const T* k = row_of<T>(p.k, bh / p.Hkv, bh % p.Hkv, rq.first);
  for (int64_t d = 0; d < p.D; ++d) mean[d] = 0;
  for (int64_t c = 0; c < rq.keys(); ++c)
    for (int64_t d = 0; d < p.D; ++d) mean[d] += to_float(k[c * p.k.row + d]);
  const float share = rq.keys() ? 1.0f / float(rq.keys()) : 0.0f;
  float squares = 0;
  for (int64_t d = 0; d < p.D; ++d) mean[d] *= share, squares += mean[d] * mean[d];
  // Squares below the normal range are flushed: hence the term behind.
  p.planes.mean_norm[bh] = __builtin_sqrtf(squares) * kNormSlack + 1e-17f;
}

template <class T>
void copy_chunk(const Problem& p, int64_t bh, int64_t chunk) {
  const Request& rq = p.requests[bh / p.Hkv];
  const int64_t c0 = chunk * kLanes;
  if (c0 >= rq.keys()) return;
  const int64_t n = rq.keys() - c0 < kLanes ? rq.keys() - c0 : kLanes, width = p.planes.width;
  const float* mean = p.planes.mean + bh * p.D;
  const T* k = row_of<T>(p.k, bh / p.Hkv, bh % p.Hkv, rq.first + c0);
  const int64_t at = bh * p.planes.chunks + chunk;
  int8_t* plane = p.planes.data + at * kLanes * width;
  int32_t* sums = p.planes.sums + at * kLanes;
  memset(plane, 0, kLanes * width);
  memset(sums, 0, kLanes * sizeof(int32_t));

  alignas(64) float x[512 + W];
  float top = 0;
  for (int64_t c = 0; c < n; ++c) {
    vf tops = {};
    widen(k + c * p.k.row, p.D, x);
    int64_t d = 0;
    for (; d + W <= p.D; d += W) {
      const vf a = (vf)((vi)(load(x + d) - load(mean + d)) & 0x7fffffff);
      tops = vmax(a, tops);
    }
    for (; d < p.D; ++d) {
      const float a = __builtin_fabsf(x[d] - mean[d]);
      top = a > top ? a : top;
    }
    for (int j = 0; j < W; ++j) top = tops[j] > top ? tops[j] : top;
  }
  const Int8Scale scale(top);
  float residual = 0, copied = 0;  // the largest sums of squares, in units of alpha
  for (int64_t c = 0; c < n; ++c) {
    widen(k + c * p.k.row, p.D, x);
    for (int64_t d = p.D; d % W; ++d) x[d] = 0;
    float r2 = 0, q2 = 0;
    int32_t sum = 0;
    for (int64_t d = 0; d < p.D; d += W) {
      const __mmask16 here = p.D - d >= W ? 0xffff : __mmask16((1u << (p.D - d)) - 1);
      const __m512 m = _mm512_maskz_loadu_ps(here, mean + d);
      const __m512 y =
          _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + d), m), _mm512_set1_ps(scale.inverse));
      const __m512i q = _mm512_cvtps_epi32(y);  // |y| <= 127 but for a rounding: q <= 127
      const __m512 r = _mm512_sub_ps(y, _mm512_cvtepi32_ps(q));
      r2 += _mm512_reduce_add_ps(_mm512_mul_ps(r, r));
      q2 += _mm512_reduce_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(q), _mm512_cvtepi32_ps(q)));
      sum += _mm512_reduce_add_epi32(q);
      _mm_mask_storeu_epi8(plane + c * width + d, here, _mm512_cvtsepi32_epi8(q));
    }
    residual = r2 > residual ? r2 : residual;
    copied = q2 > copied ? q2 : copied;
    sums[c] = -128 * sum;
  }
  p.planes.chunk[at] = {scale.alpha, scale.alpha * __builtin_sqrtf(copied) * kNormSlack,
                        scale.norm(residual, p.D)};
}
#endif

}  // namespace bsa::BSA_LEVEL
