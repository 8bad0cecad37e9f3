// The scores of keys for all rows of one key/value head (the G query heads at each of up to 8
// positions), and the max of every block.
//
// Decoding reads K once and does little with it, so the aim is memory bandwidth. Vector lanes run
// along D, where K is contiguous; 4 keys x 4 rows are summed at a time and their 16 sums are then
// folded together.
#pragma once
#include "prefill.h"

namespace bsa::BSA_LEVEL {

constexpr int kDecodeRows = NR;  // rows in a tile: as many accumulators as the tiles of prefill

// The sums of W vectors as one vector: neighbours are added until lane i holds the sum of x[i]. By
// value, and with every index known at compile time, so that the accumulators never leave their
// registers.
struct Vectors {
  vf x[W];
};
template <int N>
BSA_INLINE vf fold(const Vectors& all) {
  if constexpr (N == 1) {
    return all.x[0];
  } else {
    vi even, odd;
    for (int i = 0; i < W; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
    Vectors half;
#pragma GCC unroll 16
    for (int i = 0; i < N / 2; ++i)
      half.x[i] = __builtin_shuffle(all.x[2 * i], all.x[2 * i + 1], even) +
                  __builtin_shuffle(all.x[2 * i], all.x[2 * i + 1], odd);
    return fold<N / 2>(half);
  }
}

// The sums of all accumulators of a tile.
constexpr int kTile = kKeys * kDecodeRows;
BSA_INLINE void fold_tile(const vf (&acc)[kTile], float* out) {
  if constexpr (kTile >= W) {
#pragma GCC unroll 16
    for (int i = 0; i < kTile; i += W) {
      Vectors part;
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j) part.x[j] = acc[i + j];
      store(out + i, fold<W>(part));
    }
  } else {
    Vectors part = {};
#pragma GCC unroll 16
    for (int j = 0; j < kTile; ++j) part.x[j] = acc[j];
    const vf sums = fold<W>(part);
    memcpy(out, &sums, kTile * sizeof(float));
  }
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
  BSA_INLINE void tile(const T* const* k, const float* q, int64_t D, float* out) {
    vf acc[kTile] = {};
    const int64_t step = padded(D);
    int64_t d = 0;
    for (; d + W <= D; d += W) {
      vf x[kKeys];
      for (int i = 0; i < kKeys; ++i) x[i] = load_floats(k[i] + d);
      add<RR>(acc, x, q + d, step);
    }
    if (d < D) {
      vf x[kKeys];
      for (int i = 0; i < kKeys; ++i) x[i] = load_some(k[i] + d, D - d);
      add<RR>(acc, x, q + d, step);
    }
    fold_tile(acc, out);
  }
  template <int RR>
  BSA_INLINE void add(vf (&acc)[kTile], const vf (&x)[kKeys], const float* q, int64_t step) {
    for (int r = 0; r < RR; ++r) {
      const vf y = load(q + r * step);
      for (int i = 0; i < kKeys; ++i) acc[r * kKeys + i] += x[i] * y;
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
  BSA_INLINE void tile(const bf16* const* k, const bf16* q, int64_t D, float* out) {
    vf acc[kTile] = {};
    const int64_t step = padded(D);
    int64_t d = 0;
    for (; d + 32 <= D; d += 32) {
      __m512i x[kKeys];
      for (int i = 0; i < kKeys; ++i) x[i] = _mm512_loadu_si512(k[i] + d);
      add<RR>(acc, x, q + d, step);
    }
    if (d < D) {
      const __mmask32 some = (1u << (D - d)) - 1;
      __m512i x[kKeys];
      for (int i = 0; i < kKeys; ++i) x[i] = _mm512_maskz_loadu_epi16(some, k[i] + d);
      add<RR>(acc, x, q + d, step);
    }
    fold_tile(acc, out);
  }
  template <int RR>
  BSA_INLINE void add(vf (&acc)[kTile], const __m512i (&x)[kKeys], const bf16* q, int64_t step) {
    for (int r = 0; r < RR; ++r) {
      const __m512bh y = (__m512bh)_mm512_loadu_si512(q + r * step);
      for (int i = 0; i < kKeys; ++i)
        acc[r * kKeys + i] = (vf)_mm512_dpbf16_ps((__m512)acc[r * kKeys + i], (__m512bh)x[i], y);
    }
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

// So many rows ahead a row of the cache is asked for: the hardware does so by itself only for
// longer runs.
constexpr int64_t kAhead = 16;

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

// The keys of [lo, hi) that some position sees.
struct Seen {
  int64_t lo, hi;
  Seen(const Problem& p, const Request& rq, int64_t from, int64_t to) : lo(to), hi(from) {
    for (int64_t t = 0; t < p.Lq; ++t) {
      const Span span(p, rq, t);
      if (span.lo >= span.hi) continue;
      if (span.lo < lo) lo = span.lo;
      if (span.hi > hi) hi = span.hi;
    }
    lo = lo < from ? from : lo;
    hi = hi > to ? to : hi;
  }
};

// The blocks that decide() keeps whatever they hold: block 0, and [newest, behind), the newest one
// of each position.
struct Seed {
  int64_t newest = 0, behind = 0;
  Seed(const Problem& p, const Request& rq) {
    if (!p.causal || rq.offset + p.Lq <= 0) return;
    newest = (rq.offset > 0 ? rq.offset : 0) / p.block_k;
    behind = (rq.offset + p.Lq - 1) / p.block_k + 1;
  }
  bool has(int64_t block) const { return block == 0 || (block >= newest && block < behind); }
};

// Rows are ordered by position, then by head within the group.
template <class X>
typename X::Query* pack_rows(const Problem& p, int64_t bh, char* scratch) {
  auto* q = reinterpret_cast<typename X::Query*>(scratch);
  const int64_t head = bh % p.Hkv * p.G;
  for (int64_t r = 0; r < p.rows; ++r)
    X::pack(row_of<typename X::Element>(p.q, bh / p.Hkv, head + r % p.G, r / p.G), p.D,
            q + r * X::padded(p.D));
  return q;
}

// The scores of all rows with n keys: those that `keys` names, or the ones from `from` on.
template <class X>
void score_keys(const Problem& p, int64_t bh, const typename X::Query* q, const int32_t* keys,
                int64_t from, int64_t n) {
  using T = typename X::Element;
  const Request& rq = p.requests[bh / p.Hkv];
  const T* k = row_of<T>(p.k, bh / p.Hkv, bh % p.Hkv, rq.first);
  float* s = p.scores + bh * p.rows * p.score_stride;
  const int64_t step = X::padded(p.D);
  const auto row = [&](int64_t i) { return k + (keys ? keys[i] : from + i) * p.k.row; };
  for (int64_t c = 0; c < n; c += kKeys) {
    const T* at[kKeys];
    const int64_t here = n - c < kKeys ? n - c : kKeys;
    for (int i = 0; i < kKeys; ++i) at[i] = row(i < here ? c + i : n - 1);
    for (int i = 0; i < kKeys; ++i)
      if (c + i + kAhead < n) fetch_row<3>(row(c + i + kAhead), p.D);
    for (int64_t r = 0; r < p.rows; r += kDecodeRows) {
      alignas(64) float sums[kTile];
      const int64_t m = p.rows - r < kDecodeRows ? p.rows - r : kDecodeRows;
      if (m == kDecodeRows) {
        X::template tile<kDecodeRows>(at, q + r * step, p.D, sums);
      } else if (m == 3) {
        X::template tile<3 < kDecodeRows ? 3 : 1>(at, q + r * step, p.D, sums);
      } else if (m == 2) {
        X::template tile<2>(at, q + r * step, p.D, sums);
      } else {
        X::template tile<1>(at, q + r * step, p.D, sums);
      }
      for (int64_t y = 0; y < m; ++y) {
        float* to = s + (r + y) * p.score_stride;
        if (keys)
          for (int64_t i = 0; i < here; ++i) to[keys[c + i]] = sums[y * kKeys + i];
        else if (here == kKeys)
          memcpy(to + from + c, sums + y * kKeys, kKeys * sizeof(float));
        else  // the next keys may be another thread's
          memcpy(to + from + c, sums + y * kKeys, here * sizeof(float));
      }
    }
  }
}

// From products to scores for the keys [lo, hi).
static void finish_scores(const Problem& p, int64_t bh, int64_t lo, int64_t hi) {
  const Request& rq = p.requests[bh / p.Hkv];
  const ScoreUnits units(p);
  for (int64_t r = 0; r < p.rows; ++r) {
    float* x = p.scores + (bh * p.rows + r) * p.score_stride;
    if (!units.trivial())
      for (int64_t c = lo; c < hi; c += W) {
        const vf y = ScoreUnits::apply(units, hi - c < W ? load_some(x + c, hi - c) : load(x + c));
        memcpy(x + c, &y, (hi - c < W ? hi - c : W) * 4);
      }
    if (rq.valid)
      for (int64_t c = lo; c < hi; ++c) x[c] = rq.valid[c] ? x[c] : -kInf;
  }
}

// The max of block j in every row.
static void block_maxima(const Problem& p, int64_t bh, int64_t j) {
  const Request& rq = p.requests[bh / p.Hkv];
  for (int64_t r = 0; r < p.rows; ++r) {
    const Span span(p, rq, r / p.G);
    int64_t a = j * p.block_k, e = a + p.block_k;
    a = a < span.lo ? span.lo : a, e = e > span.hi ? span.hi : e;
    p.block_max[(bh * p.rows + r) * p.NK + j] =
        top_of(p.scores + (bh * p.rows + r) * p.score_stride + a, e - a);
  }
}

}  // namespace bsa::BSA_LEVEL
