// One vector type `vf` of W floats, as wide as the level's registers, and the few operations that
// the kernels need beyond gcc's vector arithmetic. A tile is NR vectors wide and kKeys keys high,
// so that its accumulators, one row of vectors and the broadcasts stay in registers: 16 of 32 for
// AVX-512 and NEON, 8 of 16 for AVX2 and SSE.
#pragma once
#include <cstring>

#include "problem.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef BSA_LEVEL
#error "include this from a level_*.cpp, which defines BSA_LEVEL and BSA_ISA"
#endif
#define BSA_INLINE static inline __attribute__((always_inline))

// BSA_ISA: 0 the target's baseline, 1 AVX2 with FMA and F16C, 2 AVX-512, 3 AVX-512 with bfloat16.
// Our own number, because g++ before 13 does not define __AVX2__ and its like after `#pragma GCC
// target`.
namespace bsa::BSA_LEVEL {

#if BSA_ISA >= 2
constexpr int W = 16, NR = 4;
#elif BSA_ISA >= 1
constexpr int W = 8, NR = 2;
#elif defined(__aarch64__)
constexpr int W = 4, NR = 4;
#else
constexpr int W = 4, NR = 2;
#endif
constexpr int kKeys = 4;
constexpr int kGroupLanes = W * NR;            // lanes that one tile covers
constexpr int kGroups = kLanes / kGroupLanes;  // tiles side by side in the 64 lanes
constexpr int kVectors = kLanes / W;
constexpr float kInf = __builtin_inff();
constexpr float kMax = 3.402823466e38f;

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef float vf_any __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t vi_any __attribute__((vector_size(W * 4), aligned(4), may_alias));

BSA_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
BSA_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_any*>(p) = x; }
BSA_INLINE vf splat(float x) { return x - (vf){}; }

// max(x, y) that returns y where either is NaN, which is what the machine's instruction does.
BSA_INLINE vf vmax(vf x, vf y) {
#if BSA_ISA >= 2
  return (vf)_mm512_max_ps((__m512)x, (__m512)y);
#elif BSA_ISA >= 1
  return (vf)_mm256_max_ps((__m256)x, (__m256)y);
#elif defined(__SSE2__)
  return (vf)_mm_max_ps((__m128)x, (__m128)y);
#else
  return x > y ? x : y;
#endif
}

// The same for min(x, y).
BSA_INLINE vf vmin(vf x, vf y) {
#if BSA_ISA >= 2
  return (vf)_mm512_min_ps((__m512)x, (__m512)y);
#elif BSA_ISA >= 1
  return (vf)_mm256_min_ps((__m256)x, (__m256)y);
#elif defined(__SSE2__)
  return (vf)_mm_min_ps((__m128)x, (__m128)y);
#else
  return x < y ? x : y;
#endif
}

// Whether some lane is not below its bound; NaN is never below.
BSA_INLINE bool any_not_below(vf x, vf bound) {
#if BSA_ISA >= 2
  return _mm512_cmp_ps_mask((__m512)x, (__m512)bound, _CMP_NLT_UQ) != 0;
#elif BSA_ISA >= 1
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)bound, _CMP_NLT_UQ)) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps(_mm_cmpnlt_ps((__m128)x, (__m128)bound)) != 0;
#else
  const vi below = x < bound;
  int32_t all = -1;
  for (int i = 0; i < W; ++i) all &= below[i];
  return all == 0;
#endif
}

// Whether some lane of a comparison is true.
BSA_INLINE bool any_set(vi mask) {
  return any_not_below(splat(0.0f), mask ? splat(0.0f) : splat(1.0f));
}

// The same as any_not_below for the 64 lanes at x and bound.
BSA_INLINE bool any_not_below64(const float* x, const float* bound) {
#if BSA_ISA >= 2
  unsigned any = 0;
  for (int i = 0; i < kLanes; i += W)
    any |= _mm512_cmp_ps_mask(_mm512_loadu_ps(x + i), _mm512_loadu_ps(bound + i), _CMP_NLT_UQ);
  return any != 0;
#else
  for (int i = 0; i < kLanes; i += W)
    if (any_not_below(load(x + i), load(bound + i))) return true;
  return false;
#endif
}

// Whether some of 64 lanes is above its bound; NaN is above nothing.
BSA_INLINE bool any_above(const vf (&x)[kVectors], const vf (&bound)[kVectors]) {
#if BSA_ISA >= 2
  unsigned any = 0;
  for (int j = 0; j < kVectors; ++j)
    any |= _mm512_cmp_ps_mask((__m512)x[j], (__m512)bound[j], _CMP_GT_OQ);
  return any != 0;
#else
  vi any = {};
  for (int j = 0; j < kVectors; ++j) any |= x[j] > bound[j];
  return any_set(any);
#endif
}
BSA_INLINE bool any_above64(const float* x, const float* bound) {
  vf a[kVectors], b[kVectors];
  for (int j = 0; j < kVectors; ++j) a[j] = load(x + j * W), b[j] = load(bound + j * W);
  return any_above(a, b);
}

// 2^x to about 2 ulp, 0 below the normal range, infinity above it, NaN for NaN: 2^floor(x) by
// exponent arithmetic, the rest by the polynomial with the least relative error (fitted by us with
// Lawson's method).
#if BSA_ISA >= 2
// Two registers of 2^(i / 32) leave a polynomial of degree 2 on [0, 1 / 32) (5.3e-8), whose first
// coefficient is in the table. The sum with 1.5 * 2^18 has i in its last bits.
alignas(64) constexpr float kPowers[32] = {
    1.000000053f, 1.021897203f, 1.044273838f, 1.067140457f, 1.090507790f, 1.114386802f,
    1.138788695f, 1.163724920f, 1.189207178f, 1.215247424f, 1.241857878f, 1.269051024f,
    1.296839623f, 1.325236713f, 1.354255619f, 1.383909955f, 1.414213637f, 1.445180883f,
    1.476826224f, 1.509164507f, 1.542210907f, 1.575980929f, 1.610490417f, 1.645755565f,
    1.681792920f, 1.718619389f, 1.756252253f, 1.794709170f, 1.834008183f, 1.874167733f,
    1.915206663f, 1.957144228f};
BSA_INLINE vf exp2v(vf x) {
  const vf r = (vf)_mm512_reduce_ps((__m512)x, 5 << 4 | 1);  // x - floor(32 x) / 32
  const __m512i i = (__m512i)_mm512_add_round_ps((__m512)x, _mm512_set1_ps(393216.0f),
                                                 _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const vf power = (vf)_mm512_permutex2var_ps((__m512)load(kPowers), i, (__m512)load(kPowers + W));
  const vf p = (r * 2.428406077e-01f + 6.931165269e-01f) * r;
  return (vf)_mm512_scalef_ps((__m512)(power * p + power), (__m512)x);
}
#else
// Degree 5 on [0, 1) (7.5e-8).
BSA_INLINE vf exp2v(vf x) {
  // Below -126 the result is flushed, above 128 it overflows; NaN passes both selects.
  vf t = x < -126.5f ? splat(-126.5f) : x;
  t = t > 128.0f ? splat(128.0f) : t;
  vi n = __builtin_convertvector(t, vi);
  n += t < __builtin_convertvector(n, vf);  // a true compare is -1: truncation becomes floor
  const vf r = t - __builtin_convertvector(n, vf);
  vf p = splat(1.8775766585e-03f);
  p = p * r + 8.9893401310e-03f;
  p = p * r + 5.5826318019e-02f;
  p = p * r + 2.4015361706e-01f;
  p = p * r + 6.9315307320e-01f;
  p = p * r + 9.9999992506e-01f;
  // In two steps, as 2^128 and 2^-127 have no representation of their own.
  const vi half = n >> 1;
  vf y = p * (vf)((half + 127) << 23);
  y = y * (vf)((n - half + 127) << 23);
  y = x < -126.0f ? vf{} : y;
  return x == x ? y : x;
}
#endif

BSA_INLINE float exp2s(float x) { return exp2v(splat(x))[0]; }

// tanh: through 2^x, and by its series near 0, where the difference would lose the small value.
BSA_INLINE vf tanhv(vf x) {
  const vf e = exp2v(x * 2.885390082f);
  const vf far = 1.0f - 2.0f / (e + 1.0f);
  const vf s = x * x;
  const vf near =
      x + x * s * (-0.333333333f + s * (0.133333333f + s * (-0.0539682540f + s * 0.0218694885f)));
  const vf a = x < 0.0f ? -x : x;
  return a < 0.3f ? near : far;
}

// Rows of W vectors become columns: halves change places at a distance of 1, 2, 4 and so on.
BSA_INLINE void transpose(vi (&x)[W]) {
#pragma GCC unroll 4
  for (int far = 1; far < W; far *= 2) {
    vi low, high;
    for (int j = 0; j < W; ++j) {
      low[j] = j & far ? W + j - far : j;
      high[j] = j & far ? W + j : j + far;
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (i & far) continue;
      const vi a = x[i], b = x[i + far];
      x[i] = __builtin_shuffle(a, b, low);
      x[i + far] = __builtin_shuffle(a, b, high);
    }
  }
}

BSA_INLINE float sum_of(vf x) {
  float sum = 0;
  for (int i = 0; i < W; ++i) sum += x[i];
  return sum;
}

}  // namespace bsa::BSA_LEVEL
