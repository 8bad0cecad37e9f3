// The products of prefill with AVX-512's bfloat16 dot products: twice the arithmetic of float. One
// instruction multiplies pairs of neighbours, so S takes Q^T as [D / 2][64][2] and pairs of K where
// they lie; O^T takes P as [keys / 2][64][2] and rows of V interleaved two by two. Q is not scaled
// beforehand: that would round it. Sums are in float.
#pragma once
#include "tile.h"

#if BSA_ISA >= 3
namespace bsa::BSA_LEVEL {

BSA_INLINE __m512bh pair(const void* p) { return (__m512bh)_mm512_loadu_si512(p); }
BSA_INLINE __m512bh splat_pair(const void* p) {
  int32_t bits;
  memcpy(&bits, p, 4);
  return (__m512bh)_mm512_set1_epi32(bits);
}

template <int MR, int NV>
BSA_INLINE void score_tile_bf16(const bf16* k, int64_t stride, const uint32_t* q, int64_t D,
                                float* s, vf* top) {
  __m512 acc[MR][NV] = {};
  for (int64_t d = 0; d < D; d += 2, q += kLanes) {
    __m512bh lane[NV];
    for (int j = 0; j < NV; ++j) lane[j] = pair(q + j * W);
    for (int i = 0; i < MR; ++i) {
      const __m512bh x = splat_pair(k + i * stride + d);
      for (int j = 0; j < NV; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], x, lane[j]);
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) {
      _mm512_storeu_ps(s + i * kLanes + j * W, acc[i][j]);
      top[j] = vmax(top[j], (vf)acc[i][j]);
    }
}

template <int MR, int NV>
BSA_INLINE void value_tile_bf16(const uint32_t* v, int64_t Dv, int64_t pairs, const uint32_t* p,
                                float* o) {
  __m512 acc[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) acc[i][j] = _mm512_loadu_ps(o + i * kLanes + j * W);
  for (int64_t k = 0; k < pairs; ++k, p += kLanes, v += Dv) {
    __m512bh lane[NV];
    for (int j = 0; j < NV; ++j) lane[j] = pair(p + j * W);
    for (int i = 0; i < MR; ++i) {
      const __m512bh x = splat_pair(v + i);
      for (int j = 0; j < NV; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], x, lane[j]);
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) _mm512_storeu_ps(o + i * kLanes + j * W, acc[i][j]);
}

// Rows a and b interleaved: y[d] holds a[d] in its low half, b[d] in its high half.
BSA_INLINE void interleave(const bf16* a, const bf16* b, int64_t n, uint32_t* y) {
  vi low;  // pairs of numbers, of words of a and, from 32 on, of b
  for (int i = 0; i < W; ++i) low[i] = i | (32 + i) << 16;
  const vi high = low + (16 | 16 << 16);
  int64_t d = 0;
  for (; d + 32 <= n; d += 32) {
    const __m512i x = _mm512_loadu_si512(a + d), z = _mm512_loadu_si512(b + d);
    _mm512_storeu_si512(y + d, _mm512_permutex2var_epi16(x, (__m512i)low, z));
    _mm512_storeu_si512(y + d + 16, _mm512_permutex2var_epi16(x, (__m512i)high, z));
  }
  for (; d + 16 <= n; d += 16) {
    const __m512i lo = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(a + d)));
    const __m512i hi = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(b + d)));
    _mm512_storeu_si512(y + d, _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16)));
  }
  for (; d < n; ++d) y[d] = a[d].bits | uint32_t(b[d].bits) << 16;
}

// Two vectors rounded and interleaved: lane i holds a[i] in its low half, b[i] in its high half.
BSA_INLINE __m512i zip(vf a, vf b) {
  const __m512i order =
      _mm512_setr_epi32(0x00100000, 0x00110001, 0x00120002, 0x00130003, 0x00140004, 0x00150005,
                        0x00160006, 0x00170007, 0x00180008, 0x00190009, 0x001a000a, 0x001b000b,
                        0x001c000c, 0x001d000d, 0x001e000e, 0x001f000f);
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  return _mm512_permutexvar_epi16(order, both);
}

// P [keys / 2][64][2] = 2^(S * unit + shift) of n rows of S, and each lane's sum is added to l;
// beside(k) is done after the keys k and k + 1.
template <class Beside>
BSA_INLINE void weigh(const float* s, int64_t n, float unit, const float* minus_top, float* l,
                      uint32_t* p, const Beside& beside) {
  vf sum[NR], shift[NR];
  for (int j = 0; j < NR; ++j) sum[j] = load(l + j * W), shift[j] = load(minus_top + j * W);
  for (int64_t k = 0; k < n; k += 2) {
    const bool odd = k + 1 == n;  // the last key's partner has weight 0
    for (int j = 0; j < NR; ++j) {
      const vf a = exp2v(load(s + k * kLanes + j * W) * unit + shift[j]);
      const vf b = odd ? vf{} : exp2v(load(s + (k + 1) * kLanes + j * W) * unit + shift[j]);
      sum[j] += a + b;
      _mm512_storeu_si512(p + k / 2 * kLanes + j * W, zip(a, b));
    }
    beside(k);
  }
  for (int j = 0; j < NR; ++j) store(l + j * W, sum[j]);
}

struct Bf16Engine {
  using Element = bf16;
  static constexpr bool weights_in_place = false;
  static bool serves(int64_t D) {
    return D % 2 == 0;
  }  // an odd D has half a pair: left to FloatEngine

  static float pack_q(const bf16* q, int64_t stride, int64_t rows, int64_t D, void* qt) {
    vi tops = {};
    const auto row = [&](int64_t r, int64_t d) {
      if (r >= rows) return vi{};
      const int64_t left = D / 2 - d;
      const __mmask16 here = left >= W ? 0xffff : __mmask16((1u << left) - 1);
      const vi pairs = (vi)_mm512_maskz_loadu_epi32(here, q + r * stride + 2 * d);
      tops = largest(largest(tops, pairs << 16 & 0x7fff0000), pairs & 0x7fff0000);
      return pairs;
    };
    pack_lanes(D / 2, row, static_cast<float*>(qt));
    return magnitude(tops);
  }

  template <class Ahead = NothingAhead>
  static void scores(const bf16* k, int64_t stride, int64_t n, const void* qt, int64_t D,
                     int vectors, float*, float* s, float* top, const Ahead& ahead = {}) {
    const uint32_t* q = static_cast<const uint32_t*>(qt);
    with_tile(vectors, [&]<int MR, int NV>() __attribute__((always_inline)) {
      vf tops[NV];
      for (int j = 0; j < NV; ++j) tops[j] = splat(-kInf);
      int64_t i = 0;
      for (; i + MR <= n; i += MR) {
        ahead(i, MR);
        score_tile_bf16<MR, NV>(k + i * stride, stride, q, D, s + i * kLanes, tops);
      }
      for (; i < n; ++i) score_tile_bf16<1, NV>(k + i * stride, stride, q, D, s + i * kLanes, tops);
      for (int j = 0; j < NV; ++j) store(top + j * W, tops[j]);
    });
  }

  static void values(float* s, int64_t n, const int64_t* keys, const bf16* v, int64_t stride,
                     int64_t Dv, float unit, const float* minus_top, int vectors, float* l,
                     void* packed, float* wide, float* ot) {
    uint32_t* p = static_cast<uint32_t*>(packed);
    uint32_t* pairs = reinterpret_cast<uint32_t*>(wide);
    weigh(s, n, unit, minus_top, l, p, [&](int64_t k) __attribute__((always_inline)) {
      const bf16* row = v + keys[k] * stride;
      interleave(row, k + 1 == n ? row : v + keys[k + 1] * stride, Dv, pairs + k / 2 * Dv);
    });
    const int64_t half = (n + 1) / 2;
    with_tile(vectors, [&]<int MR, int NV>() __attribute__((always_inline)) {
      int64_t d = 0;
      for (; d + MR <= Dv; d += MR)
        value_tile_bf16<MR, NV>(pairs + d, Dv, half, p, ot + d * kLanes);
      for (; d < Dv; ++d) value_tile_bf16<1, NV>(pairs + d, Dv, half, p, ot + d * kLanes);
    });
  }
};

}  // namespace bsa::BSA_LEVEL
#endif
