// Decode, pass 1 of 4: all scores of one region of keys, for all rows of one key/value head (the G
// query heads at each of up to 8 positions), and the max of every block.
//
// Decoding reads K once and does little with it, so the aim is memory bandwidth. Vector lanes run
// along D, where K is contiguous; 4 keys x 4 rows are summed at a time and their 16 sums are then
// folded together.
#pragma once
#include "prefill.h"

namespace bsa::BSA_LEVEL {

constexpr int kDecodeRows = NR;  // rows in a tile: as many accumulators as the tiles of prefill

// The sums of W vectors as one vector: neighbours are added until lane i holds the sum of x[i].
BSA_INLINE vf fold(vf* x) {
  vi even, odd;
  for (int i = 0; i < W; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
  for (int n = W; n > 1; n /= 2)
    for (int i = 0; i < n / 2; ++i)
      x[i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], even) +
             __builtin_shuffle(x[2 * i], x[2 * i + 1], odd);
  return x[0];
}

// How a level holds the query rows and multiplies them with keys; this one widens everything to
// float.
template <class T>
struct FloatDots {
  using Element = T;
  using Query = float;
  static int64_t padded(int64_t D) { return (D + W - 1) / W * W; }
  static void pack(const T* q, int64_t D, float* y) {
    memset(y + D / W * W, 0, (padded(D) - D / W * W) * sizeof(float));
    widen(q, D, y);
  }
  template <int RR>
  static void tile(const T* const* k, const float* q, int64_t D, float* out) {
    vf acc[kKeys * kDecodeRows] = {};
    const int64_t step = padded(D);
    for (int64_t d = 0; d < D; d += W) {
      vf x[kKeys];
      for (int i = 0; i < kKeys; ++i)
        x[i] = d + W <= D ? load_floats(k[i] + d) : load_some(k[i] + d, D - d);
      for (int r = 0; r < RR; ++r) {
        const vf y = load(q + r * step + d);
        for (int i = 0; i < kKeys; ++i) acc[r * kKeys + i] += x[i] * y;
      }
    }
    fold_all(acc, out);
  }
  BSA_INLINE void fold_all(vf* acc, float* out) {
    constexpr int n = kKeys * kDecodeRows;
    if constexpr (n >= W) {
      for (int i = 0; i < n; i += W) store(out + i, fold(acc + i));
    } else {
      vf all[W] = {};
      for (int i = 0; i < n; ++i) all[i] = acc[i];
      const vf sums = fold(all);
      memcpy(out, &sums, n * sizeof(float));
    }
  }
};

#if BSA_ISA >= 3
struct Bf16Dots {
  using Element = bf16;
  using Query = bf16;
  static int64_t padded(int64_t D) { return (D + 31) / 32 * 32; }
  static void pack(const bf16* q, int64_t D, bf16* y) {
    memset(y, 0, padded(D) * sizeof(bf16));
    memcpy(y, q, D * sizeof(bf16));
  }
  template <int RR>
  static void tile(const bf16* const* k, const bf16* q, int64_t D, float* out) {
    __m512 acc[kKeys * kDecodeRows] = {};
    const int64_t step = padded(D);
    for (int64_t d = 0; d < D; d += 32) {
      const __mmask32 some = D - d >= 32 ? ~0u : (1u << (D - d)) - 1;
      __m512bh x[kKeys];
      for (int i = 0; i < kKeys; ++i) x[i] = (__m512bh)_mm512_maskz_loadu_epi16(some, k[i] + d);
      for (int r = 0; r < RR; ++r) {
        const __m512bh y = (__m512bh)_mm512_loadu_si512(q + r * step + d);
        for (int i = 0; i < kKeys; ++i)
          acc[r * kKeys + i] = _mm512_dpbf16_ps(acc[r * kKeys + i], x[i], y);
      }
    }
    FloatDots<bf16>::fold_all(reinterpret_cast<vf*>(acc), out);
  }
};
#endif

// The keys that one decode row sees.
struct Span {
  int64_t lo, hi;
  Span(const Problem& p, const Request& rq, int64_t position) {
    const int64_t pos = rq.offset + position, n = rq.keys();
    lo = p.window && pos - p.window + 1 > 0 ? pos - p.window + 1 : 0;
    hi = p.causal && pos + 1 < n ? pos + 1 : n;
    if (position < rq.first_row || hi < lo) hi = lo;
  }
};

// The max of n scores, NaN if there is one among them.
BSA_INLINE float top_of(const float* x, int64_t n) {
  vf top = splat(-kInf);
  vi odd = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const vf y = load(x + i);
    top = vmax(y, top);
    odd |= y != y;
  }
  float best = -kInf;
  bool nan = false;
  for (int j = 0; j < W; ++j) best = top[j] > best ? top[j] : best, nan |= odd[j] != 0;
  for (; i < n; ++i) best = x[i] > best ? x[i] : best, nan |= x[i] != x[i];
  return nan ? __builtin_nanf("") : best;
}

template <class X>
void decode_scores(const Problem& p, int64_t bh, int64_t region, char* scratch) {
  using T = typename X::Element;
  using Query = typename X::Query;
  const int64_t b = bh / p.Hkv, kv_head = bh % p.Hkv;
  const Request& rq = p.requests[b];
  const int64_t c0 = region * p.region, c1 = c0 + p.region < rq.keys() ? c0 + p.region : rq.keys();
  if (c0 >= c1) return;
  // A region that no row sees (behind a window, or beyond the newest token) is not read.
  int64_t lo = c1, hi = c0;
  for (int64_t t = 0; t < p.Lq; ++t) {
    const Span span(p, rq, t);
    if (span.lo >= span.hi) continue;
    if (span.lo < lo) lo = span.lo;
    if (span.hi > hi) hi = span.hi;
  }
  lo = lo < c0 ? c0 : lo;
  hi = hi > c1 ? c1 : hi;
  if (lo >= hi) return;

  // Rows are ordered by position, then by head within the group.
  Query* q = reinterpret_cast<Query*>(scratch);
  const int64_t step = X::padded(p.D);
  for (int64_t r = 0; r < p.rows; ++r)
    X::pack(row_of<T>(p.q, b, kv_head * p.G + r % p.G, r / p.G), p.D, q + r * step);
  const T* k = row_of<T>(p.k, b, kv_head, rq.first);
  float* s = p.scores + bh * p.rows * p.score_stride;
  for (int64_t c = lo; c < hi; c += kKeys) {
    const T* at[kKeys];
    for (int i = 0; i < kKeys; ++i) at[i] = k + (c + i < hi ? c + i : hi - 1) * p.k.row;
    const int64_t n = hi - c < kKeys ? hi - c : kKeys;
    for (int64_t r = 0; r < p.rows; r += kDecodeRows) {
      alignas(64) float sums[kKeys * kDecodeRows];
      if (r + kDecodeRows <= p.rows) {
        X::template tile<kDecodeRows>(at, q + r * step, p.D, sums);
        for (int y = 0; y < kDecodeRows; ++y)
          memcpy(s + (r + y) * p.score_stride + c, sums + y * kKeys, n * 4);
      } else {
        for (int64_t y = r; y < p.rows; ++y) {
          X::template tile<1>(at, q + y * step, p.D, sums);
          memcpy(s + y * p.score_stride + c, sums, n * 4);
        }
      }
    }
  }

  const ScoreUnits units(p);
  for (int64_t r = 0; r < p.rows; ++r) {
    const Span span(p, rq, r / p.G);
    float* x = s + r * p.score_stride;
    if (!units.trivial())
      for (int64_t c = lo; c < hi; c += W) {
        const vf y = ScoreUnits::apply(units, hi - c < W ? load_some(x + c, hi - c) : load(x + c));
        memcpy(x + c, &y, (hi - c < W ? hi - c : W) * 4);
      }
    if (rq.valid)
      for (int64_t c = lo; c < hi; ++c) x[c] = rq.valid[c] ? x[c] : -kInf;
    if (p.block_k == 1) continue;
    for (int64_t j = lo / p.block_k; j * p.block_k < hi; ++j) {
      int64_t a = j * p.block_k, e = a + p.block_k;
      a = a < span.lo ? span.lo : a, e = e > span.hi ? span.hi : e;
      p.block_max[(bh * p.rows + r) * p.NK + j] = top_of(x + a, e - a);
    }
  }
}

}  // namespace bsa::BSA_LEVEL
