// The products of the backward with AVX-512's bfloat16 dot products, which sum over pairs of
// neighbours: S and dP over pairs along the head, dQ over pairs of keys, dK and dV over pairs of
// query rows. P and dS are rounded to bfloat16; sums are in float.
//
// Layouts: Q^T, dO^T [size / 2][64][2]; Q, dO [32][width][2]; K [keys / 2][D][2]; P, dS [keys][64],
// and dS once more as [keys / 2][64][2].
#pragma once
#include "backward_tile.h"
#include "tile_bf16.h"

#if BSA_ISA >= 3
namespace bsa::BSA_LEVEL {

// `add_tile` for weights in bfloat16 and pairs of rows at x.
template <int MR, int NV>
BSA_INLINE void add_tile_bf16(const bf16* weights, int64_t pairs, const uint32_t* x, int64_t width,
                              float* const* sums, int64_t d) {
  __m512 acc[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) acc[i][j] = _mm512_loadu_ps(sums[i] + d + j * W);
  x += d;
  for (int64_t r = 0; r < pairs; ++r, x += width) {
    __m512bh lane[NV];
    for (int j = 0; j < NV; ++j) lane[j] = pair(x + j * W);
    for (int i = 0; i < MR; ++i) {
      const __m512bh w = splat_pair(weights + i * kLanes + 2 * r);
      for (int j = 0; j < NV; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], w, lane[j]);
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) _mm512_storeu_ps(sums[i] + d + j * W, acc[i][j]);
}

struct Bf16Gradients {
  using Element = bf16;
  // An odd head size has half a pair: left to FloatGradients.
  static bool serves(const Backward& p) { return p.D % 2 == 0 && p.Dv % 2 == 0; }

  const Backward& p;
  uint32_t *qt, *dot, *q, *dout;  // Q and dO, transposed and not
  float *s, *dp;
  bf16 *w, *ds;  // P and dS
  uint32_t *ds_pairs, *k_pairs;
  bf16 *few_k, *few_v;  // keys that do not lie one after the other
  const bf16 *k, *v;
  int64_t k_stride, v_stride;

  explicit Bf16Gradients(const Backward& p_) : p(p_) {}

  template <class Take>
  void layout(Take& take) {
    const auto pairs = [&](int64_t n) { return reinterpret_cast<uint32_t*>(take(n)); };
    const auto halves = [&](int64_t n) { return reinterpret_cast<bf16*>(take(n / 2)); };
    qt = pairs(kLanes * p.D / 2), dot = pairs(kLanes * p.Dv / 2);
    q = pairs(kLanes / 2 * p.k_width()), dout = pairs(kLanes / 2 * p.v_width());
    s = take(kLanes * kLanes), dp = take(kLanes * kLanes);
    w = halves(kLanes * kLanes), ds = halves(kLanes * kLanes);
    ds_pairs = pairs(kLanes / 2 * kLanes), k_pairs = pairs(kLanes / 2 * p.D);
    few_k = halves(kLanes * p.D), few_v = halves(kLanes * p.Dv);
  }

  void take_queries(const bf16* q_rows, const bf16* dout_rows, int64_t rows, const bool* sees) {
    pack(q_rows, p.q.row, p.D, p.k_width(), rows, sees, qt, q);
    pack(dout_rows, p.dout.row, p.Dv, p.v_width(), rows, sees, dot, dout);
  }

  void take_keys(const bf16* k_rows, const bf16* v_rows, const int64_t* keys, int64_t n) {
    if (keys[n - 1] - keys[0] == n - 1) {
      k = k_rows + keys[0] * p.k.row, k_stride = p.k.row;
      v = v_rows + keys[0] * p.v.row, v_stride = p.v.row;
    } else {
      for (int64_t x = 0; x < n; ++x) {
        memcpy(few_k + x * p.D, k_rows + keys[x] * p.k.row, p.D * sizeof(bf16));
        memcpy(few_v + x * p.Dv, v_rows + keys[x] * p.v.row, p.Dv * sizeof(bf16));
      }
      k = few_k, k_stride = p.D, v = few_v, v_stride = p.Dv;
    }
    for (int64_t x = 0; x < n; x += 2)  // the partner of the last of an odd number has weight 0
      interleave(k + x * k_stride, k + (x + 1 < n ? x + 1 : x) * k_stride, p.D,
                 k_pairs + x / 2 * p.D);
  }

  void weigh(const Weights& weights, const int64_t* keys, int64_t n, int vectors) {
    alignas(64) float top[kLanes];
    Bf16Engine::scores(k, k_stride, n, qt, p.D, vectors, nullptr, s, top);
    Bf16Engine::scores(v, v_stride, n, dot, p.Dv, vectors, nullptr, dp, top);
    weights.apply(keys, n, vectors, s, dp);
    // A vector more than asked for, where that number is odd: nobody reads those lanes.
    for (int64_t x = 0; x < n; ++x)
      for (int j = 0; j < vectors; j += 2) {
        const int64_t at = x * kLanes + j * W;
        round(s + at, w + at), round(dp + at, ds + at);
      }
    for (int64_t x = 0; x < n; x += 2)
      for (int j = 0; j < vectors; ++j) {
        const float* const row = dp + x * kLanes + j * W;
        const vf next = x + 1 < n ? load(row + kLanes) : vf{};
        _mm512_storeu_si512(ds_pairs + x / 2 * kLanes + j * W, zip(load(row), next));
      }
  }

  void add_to_queries(int64_t n, int vectors, float* dqt) {
    const int64_t half = (n + 1) / 2;
    with_tile(vectors, [&]<int MR, int NV>() __attribute__((always_inline)) {
      int64_t d = 0;
      for (; d + MR <= p.D; d += MR)
        value_tile_bf16<MR, NV>(k_pairs + d, p.D, half, ds_pairs, dqt + d * kLanes);
      for (; d < p.D; ++d)
        value_tile_bf16<1, NV>(k_pairs + d, p.D, half, ds_pairs, dqt + d * kLanes);
    });
  }

  void add_to_keys(int64_t n, int64_t rows, float* const* dk, float* const* dv) {
    add_rows(w, n, rows, dout, p.v_width(), dv);
    add_rows(ds, n, rows, q, p.k_width(), dk);
  }

 private:
  static void pack(const bf16* x, int64_t stride, int64_t n, int64_t width, int64_t rows,
                   const bool* sees, uint32_t* transposed, uint32_t* plain) {
    alignas(64) static const bf16 zeros[512] = {};
    memset(transposed, 0, kLanes / 2 * n * sizeof(uint32_t));
    memset(plain, 0, kLanes / 2 * width * sizeof(uint32_t));
    for (int64_t r = 0; r < rows; r += 2) {
      const bf16* const a = sees[r] ? x + r * stride : zeros;
      const bf16* const b = r + 1 < rows && sees[r + 1] ? x + (r + 1) * stride : zeros;
      interleave(a, b, n, plain + r / 2 * width);
      for (int64_t d = 0; d < n; d += 2) {
        memcpy(transposed + d / 2 * kLanes + r, a + d, 4);
        memcpy(transposed + d / 2 * kLanes + r + 1, b + d, 4);
      }
    }
  }

  static void add_rows(const bf16* weights, int64_t n, int64_t rows, const uint32_t* x,
                       int64_t width, float* const* sums) {
    const int64_t pairs = (rows + 1) / 2;
    for (int64_t d = 0; d < width; d += NR * W) {
      const int64_t left = (width - d) / W;
      with_columns(left < NR ? left : NR, [&]<int MR, int NV>() __attribute__((always_inline)) {
        int64_t i = 0;
        for (; i + MR <= n; i += MR)
          add_tile_bf16<MR, NV>(weights + i * kLanes, pairs, x, width, sums + i, d);
        for (; i < n; ++i) add_tile_bf16<1, NV>(weights + i * kLanes, pairs, x, width, sums + i, d);
      });
    }
  }

  BSA_INLINE void round(const float* x, bf16* y) {
    _mm512_storeu_si512(y, (__m512i)_mm512_cvtne2ps_pbh((__m512)load(x + W), (__m512)load(x)));
  }
};

}  // namespace bsa::BSA_LEVEL
#endif
