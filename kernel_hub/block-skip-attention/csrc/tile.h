// The two matrix products of prefill, in float: S = K Q^T and O^T += V^T P.
//
// Both have one shape: 64 query rows lie side by side in vector lanes, and a scalar of K (or V),
// read where it lies in memory, is broadcast against them. So neither K nor V is ever packed or
// transposed, only Q, once a task. Layouts, with L = kGroupLanes: Q^T [groups][D][L], S and P
// [keys][64], O^T [groups][Dv][L].
#pragma once
#include "convert.h"

namespace bsa::BSA_LEVEL {

// Scores of MR keys at k (`stride` apart) for one group of lanes; `top` gathers their max.
template <int MR>
BSA_INLINE void score_tile(const float* k, int64_t stride, const float* q, int64_t D, float* s,
                           vf* top) {
  vf acc[MR][NR] = {};
  for (int64_t d = 0; d < D; ++d, q += kGroupLanes) {
    vf lane[NR];
    for (int j = 0; j < NR; ++j) lane[j] = load(q + j * W);
    for (int i = 0; i < MR; ++i) {
      const vf x = splat(k[i * stride + d]);
      for (int j = 0; j < NR; ++j) acc[i][j] += x * lane[j];
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NR; ++j) {
      store(s + i * kLanes + j * W, acc[i][j]);
      top[j] = vmax(top[j], acc[i][j]);
    }
}

// S [n][64] of n keys at k, and each lane's max over them.
BSA_INLINE void score_rows(const float* k, int64_t stride, int64_t n, const float* qt, int64_t D,
                           float* s, float* top) {
  for (int g = 0; g < kGroups; ++g) {
    const float* q = qt + g * D * kGroupLanes;
    float* sg = s + g * kGroupLanes;
    vf tops[NR];
    for (int j = 0; j < NR; ++j) tops[j] = splat(-kInf);
    int64_t i = 0;
    for (; i + kKeys <= n; i += kKeys)
      score_tile<kKeys>(k + i * stride, stride, q, D, sg + i * kLanes, tops);
    for (; i < n; ++i) score_tile<1>(k + i * stride, stride, q, D, sg + i * kLanes, tops);
    for (int j = 0; j < NR; ++j) store(top + g * kGroupLanes + j * W, tops[j]);
  }
}

// MR columns, from d on, of O^T += V^T P for one group of lanes and n keys.
template <int MR>
BSA_INLINE void value_tile(const float* const* v, int64_t d, int64_t n, const float* p, float* o) {
  vf acc[MR][NR];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NR; ++j) acc[i][j] = load(o + i * kGroupLanes + j * W);
  for (int64_t k = 0; k < n; ++k, p += kLanes) {
    const float* row = v[k] + d;
    vf lane[NR];
    for (int j = 0; j < NR; ++j) lane[j] = load(p + j * W);
    for (int i = 0; i < MR; ++i) {
      const vf x = splat(row[i]);
      for (int j = 0; j < NR; ++j) acc[i][j] += x * lane[j];
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NR; ++j) store(o + i * kGroupLanes + j * W, acc[i][j]);
}

BSA_INLINE void value_rows(const float* const* v, int64_t n, const float* p, int64_t Dv,
                           float* ot) {
  for (int g = 0; g < kGroups; ++g) {
    float* o = ot + g * Dv * kGroupLanes;
    const float* pg = p + g * kGroupLanes;
    int64_t d = 0;
    for (; d + kKeys <= Dv; d += kKeys) value_tile<kKeys>(v, d, n, pg, o + d * kGroupLanes);
    for (; d < Dv; ++d) value_tile<1>(v, d, n, pg, o + d * kGroupLanes);
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
  static bool serves(int64_t) { return true; }

  // Q^T from `rows` rows of q; the other lanes are 0. Returns the largest |q|.
  static float pack_q(const T* q, int64_t stride, int64_t rows, int64_t D, void* qt) {
    float top = 0;
    float* y = static_cast<float*>(qt);
    memset(y, 0, kLanes * D * sizeof(float));
    for (int64_t r = 0; r < rows; ++r) {
      const T* x = q + r * stride;
      top = bsa::BSA_LEVEL::max_abs(x, D, top);
      float* to = y + (r / kGroupLanes) * D * kGroupLanes + r % kGroupLanes;
      for (int64_t d = 0; d < D; ++d) to[d * kGroupLanes] = to_float(x[d]);
    }
    return top;
  }

  static void scores(const T* k, int64_t stride, int64_t n, const void* qt, int64_t D, float* wide,
                     float* s, float* top) {
    const float* q = static_cast<const float*>(qt);
    if constexpr (sizeof(T) == 4) {
      score_rows(k, stride, n, q, D, s, top);
    } else {
      for (int64_t i = 0; i < n; ++i) widen(k + i * stride, D, wide + i * D);
      score_rows(wide, D, n, q, D, s, top);
    }
  }

  // P = 2^(S * unit - top) for n <= 64 rows of S, then O^T += V^T P with the rows of V that `keys`
  // names.
  static void values(float* s, int64_t n, const int64_t* keys, const T* v, int64_t stride,
                     int64_t Dv, float unit, const float* minus_top, float* l, void*, float* wide,
                     float* ot) {
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
    value_rows(rows, n, s, Dv, ot);
  }
};

}  // namespace bsa::BSA_LEVEL
