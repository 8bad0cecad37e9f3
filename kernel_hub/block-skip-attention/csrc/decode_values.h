// Decode, passes 3 and 4: the weighted values of one region, reading only the rows of V that count,
// and the sum over the regions. The max of every row is already final, so partial sums of regions
// simply add, in a fixed order.
#pragma once
#include "decode_decide.h"

namespace bsa::BSA_LEVEL {

constexpr int64_t kBatch =
    32;  // keys whose rows of V stay in the nearest cache while all heads use them

// RR rows of out += weights x V, for columns [d, d + NR * W) and n keys; weights [rows][stride].
// Meanwhile the rows of V for the next `ahead` keys are asked for.
template <int RR, class T>
BSA_INLINE void weigh_tile(const T* const* v, int64_t n, int64_t d, int64_t Dv,
                           const float* weights, int64_t stride, float* out, int64_t out_stride,
                           int64_t ahead) {
  vf acc[RR][NR];
  for (int r = 0; r < RR; ++r)
    for (int j = 0; j < NR; ++j) acc[r][j] = load(out + r * out_stride + d + j * W);
  for (int64_t c = 0; c < n; ++c) {
    if (c < ahead) fetch_row<3>(v[c + kBatch], Dv);
    vf x[NR];
    for (int j = 0; j < NR; ++j) x[j] = load_floats(v[c] + d + j * W);
    for (int r = 0; r < RR; ++r) {
      const vf w = splat(weights[r * stride + c]);
      for (int j = 0; j < NR; ++j) acc[r][j] += w * x[j];
    }
  }
  for (int r = 0; r < RR; ++r)
    for (int j = 0; j < NR; ++j) store(out + r * out_stride + d + j * W, acc[r][j]);
}

template <int RR, class T>
BSA_INLINE void weigh_rows(const T* const* v, int64_t n, int64_t Dv, const float* weights,
                           int64_t stride, float* out, int64_t out_stride, int64_t ahead) {
  int64_t d = 0;
  for (; d + NR * W <= Dv; d += NR * W)
    weigh_tile<RR>(v, n, d, Dv, weights, stride, out, out_stride, d ? 0 : ahead);
  for (; d < Dv; d += W) {
    const int64_t m = Dv - d < W ? Dv - d : W;
    for (int r = 0; r < RR; ++r) {
      float* y = out + r * out_stride + d;
      vf acc = m < W ? load_some(y, m) : load(y);
      for (int64_t c = 0; c < n; ++c)
        acc += weights[r * stride + c] * (m < W ? load_some(v[c] + d, m) : load_floats(v[c] + d));
      memcpy(y, &acc, m * sizeof(float));
    }
  }
}

template <class T>
void decode_values(const Problem& p, int64_t bh, int64_t region, char* scratch) {
  const int64_t b = bh / p.Hkv, kv_head = bh % p.Hkv;
  const Request& rq = p.requests[b];
  const int64_t c0 = region * p.region, c1 = c0 + p.region < rq.keys() ? c0 + p.region : rq.keys();
  const int64_t width = partial_width(p);
  float* out = p.partial + (bh * p.regions + region) * p.rows * width;
  memset(out, 0, p.rows * width * sizeof(float));
  if (c0 >= c1) return;
  const T* v = row_of<T>(p.v, b, kv_head, rq.first);
  const float unit = ScoreUnits(p).unit;
  const T** rows = reinterpret_cast<const T**>(scratch);
  int32_t* keys = reinterpret_cast<int32_t*>(rows + p.region);
  float* weights = reinterpret_cast<float*>(keys + p.region);
  const int64_t stride = p.region;  // a multiple of 64

  for (int64_t t = 0; t < p.Lq; ++t) {
    const Span span(p, rq, t);
    const int64_t lo = span.lo > c0 ? span.lo : c0, hi = span.hi < c1 ? span.hi : c1;
    const uint8_t* fate = p.fate + (bh * p.Lq + t) * p.NK;
    int64_t n = 0;
    for (int64_t a = lo, j = lo / p.block_k; a < hi; ++j) {
      const int64_t e = (j + 1) * p.block_k < hi ? (j + 1) * p.block_k : hi;
      if (fate[j] == kKept)
        for (int64_t c = a; c < e; ++c) {
          rows[n] = v + c * p.v.row;
          keys[n] = int32_t(c - c0);
          n += !rq.valid || rq.valid[c];
        }
      a = e;
    }
    if (n == 0) continue;
    for (int64_t g = 0; g < p.G; ++g) {
      const int64_t r = t * p.G + g;
      const float* s = p.scores + (bh * p.rows + r) * p.score_stride + c0;
      float* w = weights + g * stride;
      for (int64_t i = 0; i < n; ++i) w[i] = s[keys[i]];
      const float top = p.row_max[bh * p.rows + r], shift = top == -kInf ? 0.0f : top;
      vf sum = {};
      for (int64_t i = 0; i < n; i += W) {
        if (n - i < W)
          for (int64_t x = n; x < i + W; ++x) w[x] = -kInf;
        const vf y = exp2v((load(w + i) - shift) * unit);
        store(w + i, y);
        sum += y;
      }
      float total = 0;
      for (int j = 0; j < W; ++j) total += sum[j];
      out[r * width + p.Dv] = total;
    }
    float* to = out + t * p.G * width;
    for (int64_t i = 0; i < n; i += kBatch) {
      const int64_t m = n - i < kBatch ? n - i : kBatch;
      for (int64_t g = 0; g < p.G; g += 4) {
        const int64_t left = p.G - g, ahead = g ? 0 : n - i - kBatch;
        const float* w = weights + g * stride + i;
        if (left >= 4)
          weigh_rows<4>(rows + i, m, p.Dv, w, stride, to + g * width, width, ahead);
        else if (left == 3)
          weigh_rows<3>(rows + i, m, p.Dv, w, stride, to + g * width, width, ahead);
        else if (left == 2)
          weigh_rows<2>(rows + i, m, p.Dv, w, stride, to + g * width, width, ahead);
        else
          weigh_rows<1>(rows + i, m, p.Dv, w, stride, to + g * width, width, ahead);
      }
    }
  }
}

template <class T>
void decode_finish(const Problem& p, int64_t bh) {
  const int64_t b = bh / p.Hkv, kv_head = bh % p.Hkv, width = partial_width(p);
  const Request& rq = p.requests[b];
  const float unit = ScoreUnits(p).unit;
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t t = r / p.G, h = kv_head * p.G + r % p.G;
    // Regions add up into the first one.
    float* sum = p.partial + (bh * p.regions * p.rows + r) * width;
    for (int64_t x = 1; x < p.regions; ++x) {
      const float* more = sum + x * p.rows * width;
      for (int64_t d = 0; d <= p.Dv; ++d) sum[d] += more[d];
    }
    const Span span(p, rq, t);
    const bool sees = rq.count(span.lo, span.hi) > 0;
    const RowEnd end = end_row(p.row_max[bh * p.rows + r] * unit, sum[p.Dv],
                               p.row_c[bh * p.rows + r], sees, p.sinks ? p.sinks + h : nullptr);
    p.lse[(b * p.Hq + h) * p.Lq + t] = end.lse;
    if (p.dropped) p.dropped[(b * p.Hq + h) * p.Lq + t] = end.dropped;
    T* y = static_cast<T*>(p.out) + ((b * p.Lq + t) * p.Hq + h) * p.Dv;
    for (int64_t d = 0; d < p.Dv; ++d) from_float(sees ? sum[d] * end.factor : 0.0f, y + d);
  }
}

}  // namespace bsa::BSA_LEVEL
