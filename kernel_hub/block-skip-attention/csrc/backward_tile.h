// The five products of the backward, in float. 64 query rows lie side by side in vector lanes, as
// in the forward, and three of the products are the forward's own tiles:
//
//   S = K Q^T and dP = V dO^T   score_rows, with Q^T and dO^T packed once a task
//   dQ^T += K^T dS              value_rows, with K in the place of V
//   dV += P dO and dK += dS Q   add_rows: a key's row of sums is a vector, and a weight is
//   broadcast
//
// Layouts, with L = kGroupLanes: Q^T, dQ^T [groups][D][L]; S, dP, P, dS [keys][64]; Q, dO
// [64][width].
#pragma once
#include "backward_weights.h"
#include "tile.h"

namespace bsa::BSA_LEVEL {

// Calls tile<MR, NV>() for `vectors` (at most NR) vectors of columns.
template <class F>
BSA_INLINE void with_columns(int64_t vectors, const F& tile) {
  if (vectors == 1) return tile.template operator()<2 * kKeys, 1>();
  if constexpr (NR == 4) {
    if (vectors == 2) return tile.template operator()<2 * kKeys, 2>();
    if (vectors == 3) return tile.template operator()<kKeys, 3>();
  }
  tile.template operator()<kKeys, NR>();
}

// Columns d on of MR rows of sums += the weights' rows times the rows at x.
template <int MR, int NV>
BSA_INLINE void add_tile(const float* weights, int64_t rows, const float* x, int64_t width,
                         float* const* sums, int64_t d) {
  vf acc[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) acc[i][j] = load(sums[i] + d + j * W);
  x += d;
  for (int64_t r = 0; r < rows; ++r, x += width) {
    vf lane[NV];
    for (int j = 0; j < NV; ++j) lane[j] = load(x + j * W);
    for (int i = 0; i < MR; ++i) {
      const vf w = splat(weights[i * kLanes + r]);
      for (int j = 0; j < NV; ++j) acc[i][j] += w * lane[j];
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) store(sums[i] + d + j * W, acc[i][j]);
}

// n rows of sums += weights [n][64] times x [rows][width].
BSA_INLINE void add_rows(const float* weights, int64_t n, int64_t rows, const float* x,
                         int64_t width, float* const* sums) {
  for (int64_t d = 0; d < width; d += NR * W) {
    const int64_t left = (width - d) / W;
    with_columns(left < NR ? left : NR, [&]<int MR, int NV>() __attribute__((always_inline)) {
      int64_t i = 0;
      for (; i + MR <= n; i += MR)
        add_tile<MR, NV>(weights + i * kLanes, rows, x, width, sums + i, d);
      for (; i < n; ++i) add_tile<1, NV>(weights + i * kLanes, rows, x, width, sums + i, d);
    });
  }
}

// The products over one chunk of keys for one block row, with whatever form they want their factors
// in. This engine serves every element type and level; what is not float is widened.
template <class T>
struct FloatGradients {
  using Element = T;

  const Backward& p;
  float *qt, *dot, *q, *dout;  // Q and dO, transposed and not
  float *s, *dp;               // products, then P and dS
  float *wide_k, *wide_v;      // keys that do not lie one after the other, or are not float
  const float *k, *v;
  int64_t k_stride, v_stride;

  explicit FloatGradients(const Backward& p_) : p(p_) {}

  template <class Take>
  void layout(Take& take) {
    qt = take(kLanes * p.D), dot = take(kLanes * p.Dv);
    q = take(kLanes * p.k_width()), dout = take(kLanes * p.v_width());
    s = take(kLanes * kLanes), dp = take(kLanes * kLanes);
    wide_k = take(kLanes * p.D), wide_v = take(kLanes * p.Dv);
  }

  // Rows of Q and dO; those that see no key count as zeros.
  void take_queries(const T* q_rows, const T* dout_rows, int64_t rows, const bool* sees) {
    pack(q_rows, p.q.row, p.D, p.k_width(), rows, sees, qt, q);
    pack(dout_rows, p.dout.row, p.Dv, p.v_width(), rows, sees, dot, dout);
  }

  void take_keys(const T* k_rows, const T* v_rows, const int64_t* keys, int64_t n) {
    if constexpr (sizeof(T) == 4) {
      if (keys[n - 1] - keys[0] == n - 1) {
        k = k_rows + keys[0] * p.k.row, k_stride = p.k.row;
        v = v_rows + keys[0] * p.v.row, v_stride = p.v.row;
        return;
      }
    }
    for (int64_t x = 0; x < n; ++x) {
      widen(k_rows + keys[x] * p.k.row, p.D, wide_k + x * p.D);
      widen(v_rows + keys[x] * p.v.row, p.Dv, wide_v + x * p.Dv);
    }
    k = wide_k, k_stride = p.D, v = wide_v, v_stride = p.Dv;
  }

  void weigh(const Weights& weights, const int64_t* keys, int64_t n, int vectors) {
    alignas(64) float top[kLanes];
    score_rows(k, k_stride, n, qt, p.D, vectors, s, top);
    score_rows(v, v_stride, n, dot, p.Dv, vectors, dp, top);
    weights.apply(keys, n, vectors, s, dp);
  }

  void add_to_queries(int64_t n, int vectors, float* dqt) {
    const float* rows[kLanes];
    for (int64_t x = 0; x < n; ++x) rows[x] = k + x * k_stride;
    value_rows(rows, n, dp, p.D, vectors, dqt);
  }

  void add_to_keys(int64_t n, int64_t rows, float* const* dk, float* const* dv) {
    add_rows(s, n, rows, dout, p.v_width(), dv);
    add_rows(dp, n, rows, q, p.k_width(), dk);
  }

 private:
  static void pack(const T* x, int64_t stride, int64_t n, int64_t width, int64_t rows,
                   const bool* sees, float* transposed, float* plain) {
    memset(transposed, 0, kLanes * n * sizeof(float));
    memset(plain, 0, kLanes * width * sizeof(float));
    for (int64_t r = 0; r < rows; ++r) {
      if (!sees[r]) continue;
      widen(x + r * stride, n, plain + r * width);
      float* to = transposed + (r / kGroupLanes) * n * kGroupLanes + r % kGroupLanes;
      for (int64_t d = 0; d < n; ++d) to[d * kGroupLanes] = plain[r * width + d];
    }
  }
};

}  // namespace bsa::BSA_LEVEL
