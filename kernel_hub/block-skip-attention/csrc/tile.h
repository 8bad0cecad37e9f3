// The two matrix products of prefill, in float: S = K Q^T and O^T += V^T P.
//
// Both have one shape: 64 query rows lie side by side in vector lanes, and a scalar of K (or V),
// read where it lies in memory, is broadcast against them. So neither K nor V is ever packed or
// transposed, only Q, once a task. Layouts, with L = kGroupLanes: Q^T [groups][D][L], S and P
// [keys][64], O^T [groups][Dv][L].
#pragma once
#include "convert.h"

namespace bsa::BSA_LEVEL {

// Calls tile<MR, NV>() for a group that holds rows in `vectors` of its NR vectors: a few rows need
// narrow tiles, which are higher instead, to have as many sums under way.
template <class F>
BSA_INLINE void with_tile(int vectors, const F& tile) {
  if constexpr (NR == 4) {
    if (vectors == 1) return tile.template operator()<2 * kKeys, 1>();
    if (vectors == 2) return tile.template operator()<2 * kKeys, 2>();
  } else if (vectors == 1) {
    return tile.template operator()<2 * kKeys, 1>();
  }
  tile.template operator()<kKeys, NR>();
}

// Scores of MR keys at k (`stride` apart) for NV vectors of lanes; `top` gathers their max.
template <int MR, int NV>
BSA_INLINE void score_tile(const float* k, int64_t stride, const float* q, int64_t D, float* s,
                           vf* top) {
  vf acc[MR][NV] = {};
  for (int64_t d = 0; d < D; ++d, q += kGroupLanes) {
    vf lane[NV];
    for (int j = 0; j < NV; ++j) lane[j] = load(q + j * W);
    for (int i = 0; i < MR; ++i) {
      const vf x = splat(k[i * stride + d]);
      for (int j = 0; j < NV; ++j) acc[i][j] += x * lane[j];
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) {
      store(s + i * kLanes + j * W, acc[i][j]);
      top[j] = vmax(top[j], acc[i][j]);
    }
}

// What a product does beside: ahead(i, m) before keys [i, i + m). It is where rows that are needed
// later are fetched, a few at a time: a burst of requests would have to queue.
struct NothingAhead {
  void operator()(int64_t, int64_t) const {}
};

// Asks for a row, without waiting for it; `kNear` is 3 for the nearest cache, 2 for the next.
template <int kNear = 2, class T>
BSA_INLINE void fetch_row(const T* row, int64_t n) {
  for (int64_t d = 0; d < n; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + d, 0, kNear);
}

// S [n][64] of n keys at k, and each lane's max over them, for the lanes of `vectors` vectors.
template <class Ahead = NothingAhead>
BSA_INLINE void score_rows(const float* k, int64_t stride, int64_t n, const float* qt, int64_t D,
                           int vectors, float* s, float* top, const Ahead& ahead = {}) {
  for (int g = 0; g * NR < vectors; ++g) {
    const float* q = qt + g * D * kGroupLanes;
    float* sg = s + g * kGroupLanes;
    with_tile(vectors - g * NR, [&]<int MR, int NV>() __attribute__((always_inline)) {
      vf tops[NV];
      for (int j = 0; j < NV; ++j) tops[j] = splat(-kInf);
      int64_t i = 0;
      for (; i + MR <= n; i += MR) {
        if (g == 0) ahead(i, MR);
        score_tile<MR, NV>(k + i * stride, stride, q, D, sg + i * kLanes, tops);
      }
      for (; i < n; ++i) score_tile<1, NV>(k + i * stride, stride, q, D, sg + i * kLanes, tops);
      for (int j = 0; j < NV; ++j) store(top + g * kGroupLanes + j * W, tops[j]);
    });
  }
}

// MR columns, from d on, of O^T += V^T P for NV vectors of lanes and n keys.
template <int MR, int NV>
BSA_INLINE void value_tile(const float* const* v, int64_t d, int64_t n, const float* p, float* o) {
  vf acc[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) acc[i][j] = load(o + i * kGroupLanes + j * W);
  for (int64_t k = 0; k < n; ++k, p += kLanes) {
    const float* row = v[k] + d;
    vf lane[NV];
    for (int j = 0; j < NV; ++j) lane[j] = load(p + j * W);
    for (int i = 0; i < MR; ++i) {
      const vf x = splat(row[i]);
      for (int j = 0; j < NV; ++j) acc[i][j] += x * lane[j];
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) store(o + i * kGroupLanes + j * W, acc[i][j]);
}

BSA_INLINE void value_rows(const float* const* v, int64_t n, const float* p, int64_t Dv,
                           int vectors, float* ot) {
  for (int g = 0; g * NR < vectors; ++g) {
    float* o = ot + g * Dv * kGroupLanes;
    const float* pg = p + g * kGroupLanes;
    with_tile(vectors - g * NR, [&]<int MR, int NV>() __attribute__((always_inline)) {
      int64_t d = 0;
      for (; d + MR <= Dv; d += MR) value_tile<MR, NV>(v, d, n, pg, o + d * kGroupLanes);
      for (; d < Dv; ++d) value_tile<1, NV>(v, d, n, pg, o + d * kGroupLanes);
    });
  }
}

// The rows of Q side by side in lanes: row(r, d) gives W of the n words of row r, from word d on.
template <class Row>
BSA_INLINE void pack_lanes(int64_t n, const Row& row, float* y) {
  for (int r = 0; r < kLanes; r += W) {
    float* to = y + (r / kGroupLanes) * n * kGroupLanes + r % kGroupLanes;
    for (int64_t d = 0; d < n; d += W) {
      vi x[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) x[i] = row(r + i, d);
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i, to += kGroupLanes)
        if (d + i < n) store(to, (vf)x[i]);
    }
  }
}

// S becomes P = 2^(S * unit - top), and each lane's sum is added to l.
BSA_INLINE void exponentials(float* s, int64_t n, float unit, const float* minus_top, float* l) {
  vf sum[kVectors], shift[kVectors];
  for (int j = 0; j < kVectors; ++j) sum[j] = load(l + j * W), shift[j] = load(minus_top + j * W);
  for (int64_t k = 0; k < n; ++k, s += kLanes)
    for (int j = 0; j < kVectors; ++j) {
      const vf p = exp2v(load(s + j * W) * unit + shift[j]);
      store(s + j * W, p);
      sum[j] += p;
    }
  for (int j = 0; j < kVectors; ++j) store(l + j * W, sum[j]);
}

// An engine bundles the products with how it holds Q, K and V. This one serves every element type
// and level: what is not float is widened 64 rows at a time, which costs 1/64 of the product.
template <class T>
struct FloatEngine {
  using Element = T;
  static constexpr bool weights_in_place = true;  // whether values() leaves the weights in s
  static bool serves(int64_t) { return true; }

  // Q^T from `rows` rows of q; the other lanes are 0. Returns the largest |q|.
  static float pack_q(const T* q, int64_t stride, int64_t rows, int64_t D, void* qt) {
    vi tops = {};
    const auto row = [&](int64_t r, int64_t d) {
      if (r >= rows) return vi{};
      const T* const x = q + r * stride + d;
      const vi floats = (vi)(D - d >= W ? load_floats(x) : load_some(x, D - d));
      tops = largest(tops, floats & 0x7fffffff);
      return floats;
    };
    pack_lanes(D, row, static_cast<float*>(qt));
    return magnitude(tops);
  }

  template <class Ahead = NothingAhead>
  static void scores(const T* k, int64_t stride, int64_t n, const void* qt, int64_t D, int vectors,
                     float* wide, float* s, float* top, const Ahead& ahead = {}) {
    const float* q = static_cast<const float*>(qt);
    if constexpr (sizeof(T) == 4) {
      score_rows(k, stride, n, q, D, vectors, s, top, ahead);
    } else {
      for (int64_t i = 0; i < n; ++i) widen(k + i * stride, D, wide + i * D);
      score_rows(wide, D, n, q, D, vectors, s, top, ahead);
    }
  }

  // P = 2^(S * unit - top) for n <= 64 rows of S, then O^T += V^T P with the rows of V that `keys`
  // names.
  static void values(float* s, int64_t n, const int64_t* keys, const T* v, int64_t stride,
                     int64_t Dv, float unit, const float* minus_top, int vectors, float* l, void*,
                     float* wide, float* ot) {
    exponentials(s, n, unit, minus_top, l);
    const float* rows[kLanes];
    for (int64_t i = 0; i < n; ++i) {
      const T* row = v + keys[i] * stride;
      if constexpr (sizeof(T) == 4) {
        rows[i] = row;
      } else {
        widen(row, Dv, wide + i * Dv);
        rows[i] = wide + i * Dv;
      }
    }
    value_rows(rows, n, s, Dv, vectors, ot);
  }
};

}  // namespace bsa::BSA_LEVEL
