// Element types: float, bfloat16, IEEE half. Arithmetic is always in float; these turn rows into
// floats and back.
#pragma once
#include "simd.h"

namespace bsa::BSA_LEVEL {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

BSA_INLINE float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
BSA_INLINE uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

BSA_INLINE float to_float(float x) { return x; }
BSA_INLINE float to_float(bf16 x) { return as_float(uint32_t(x.bits) << 16); }
BSA_INLINE float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = uint32_t(x.bits & 0x7fff)
                                                                     << 13;
  // Times 2^112 moves the exponent's bias and makes subnormals normal; infinity and NaN keep their
  // own exponent.
  if (magnitude >= 0x0f800000) return as_float(sign | magnitude | 0x7f800000);
  if (magnitude < 0x00800000)
    return as_float(sign | as_bits(float(magnitude >> 13) * 5.9604644775390625e-8f));
  return as_float(sign | (magnitude + 0x38000000));
}

BSA_INLINE void from_float(float x, float* y) { *y = x; }
BSA_INLINE void from_float(float x, bf16* y) {
  const uint32_t b = as_bits(x);
  // Round to nearest even; NaN must not round to infinity.
  y->bits = x != x ? uint16_t((b >> 16) | 0x40) : uint16_t((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
BSA_INLINE void from_float(float x, f16* y) {
  const uint32_t b = as_bits(x), sign = (b >> 16) & 0x8000;
  const uint32_t a = b & 0x7fffffff;
  uint32_t h;
  if (a > 0x7f800000) {
    h = 0x7e00;
  } else if (a >= 0x477ff000) {  // rounds to 65536 or more
    h = 0x7c00;
  } else if (a < 0x38800000) {  // below 2^-14: a subnormal half; adding 0.5 lets the adder round to
                                // its last place
    h = as_bits(as_float(a) + 0.5f) - as_bits(0.5f);
  } else {
    h = (a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13;
  }
  y->bits = uint16_t(sign | h);
}

// W elements as floats.
BSA_INLINE vf load_floats(const float* p) { return load(p); }
BSA_INLINE vf load_floats(const bf16* p) {
#if BSA_ISA >= 2
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif BSA_ISA >= 1
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  vf x;
  for (int i = 0; i < W; ++i) x[i] = to_float(p[i]);
  return x;
#endif
}
BSA_INLINE vf load_floats(const f16* p) {
#if BSA_ISA >= 2
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif BSA_ISA >= 1
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vf x;
  for (int i = 0; i < W; ++i) x[i] = to_float(p[i]);
  return x;
#endif
}

// The first n < W elements as floats, the rest 0. Never reads past them.
template <class T>
BSA_INLINE vf load_some(const T* p, int64_t n) {
  T padded[W] = {};
  memcpy(padded, p, n * sizeof(T));
  return load_floats(padded);
}

// n elements at p as floats at y.
template <class T>
BSA_INLINE void widen(const T* p, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(y + i, load_floats(p + i));
  for (; i < n; ++i) y[i] = to_float(p[i]);
}

// n floats at x as elements at y, rounded to nearest even.
template <class T>
BSA_INLINE void narrow(const float* x, int64_t n, T* y) {
  int64_t i = 0;
#if BSA_ISA >= 3
  if constexpr (__is_same(T, bf16)) {
    for (; i + W <= n; i += W)
      _mm256_storeu_si256((__m256i*)(y + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i)));
  }
#endif
#if BSA_ISA >= 1
  if constexpr (__is_same(T, f16)) {
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128((__m128i*)(y + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (; i < n; ++i) from_float(x[i], y + i);
}

// The larger magnitude, lane by lane. As integers: there the order of magnitudes is the same, and
// NaN is the largest.
BSA_INLINE vi largest(vi a, vi b) { return a > b ? a : b; }

// The largest of W magnitudes, infinity if one of them is not finite.
BSA_INLINE float magnitude(vi tops) {
  int32_t top = 0;
  for (int j = 0; j < W; ++j) top = tops[j] > top ? tops[j] : top;
  return top >= 0x7f800000 ? kInf : as_float(uint32_t(top));
}

// The largest |x| among n elements and `so_far`, infinity if one of them is not finite.
template <class T>
BSA_INLINE float max_abs(const T* p, int64_t n, float so_far) {
  vi tops = int32_t(as_bits(so_far)) - vi{};
  int64_t i = 0;
  for (; i + W <= n; i += W) tops = largest(tops, (vi)load_floats(p + i) & 0x7fffffff);
  for (; i < n; ++i) tops = largest(tops, int32_t(as_bits(to_float(p[i])) & 0x7fffffff) - vi{});
  return magnitude(tops);
}

template <class T>
BSA_INLINE const T* row_of(const Strided& x, int64_t b, int64_t h, int64_t r) {
  return static_cast<const T*>(x.data) + b * x.batch + h * x.head + r * x.row;
}

}  // namespace bsa::BSA_LEVEL
