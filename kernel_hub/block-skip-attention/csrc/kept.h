// The keys that a block row of prefill keeps. Their scores wait in a buffer, compacted; when it
// holds 64 keys, their weights and their products with V are added to the output.
#pragma once
#include "finish.h"
#include "tile.h"
#include "units.h"

namespace bsa::BSA_LEVEL {

template <class E>
struct Kept {
  using T = typename E::Element;
  const Problem& p;
  const Request& rq;
  const float unit;   // score units to base-2 logarithms
  const int vectors;  // that hold rows; the lanes behind them are never looked at
  const T* v;
  float *s, *wide, *ot;  // scores [64 + step][64]; one row of scratch a key; O^T
  char* packed;
  int64_t* keys;  // whose scores are in s
  int64_t held = 0;
  alignas(64) float l[kLanes], at[kLanes];  // sum of weights, and the score they are relative to
  alignas(64) float minus_top[kLanes];      // the weights last added are 2^(s * unit + minus_top)

  Kept(const Problem& p_, const Request& rq_, float unit_, int vectors_)
      : p(p_), rq(rq_), unit(unit_), vectors(vectors_) {}

  void start() {
    memset(ot, 0, kLanes * p.Dv * sizeof(float));
    for (int j = 0; j < kLanes; ++j) l[j] = 0, at[j] = -kInf;
  }

  void fetch(int64_t key) const { fetch_row(v + key * p.v.row, p.Dv); }

  // Where the next scores belong: what is kept of them is then moved down to here.
  float* next() { return s + held * kLanes; }

  void hold(const float* row, int64_t key) {
    float* const to = next();
    if (to != row)
      for (int r = 0; r < kLanes; r += W) store(to + r, load(row + r));
    fetch(key);
    keys[held++] = key;
  }

  // The n keys from `a` on; those that are not valid are left out.
  void hold(const float* block, int64_t a, int64_t n) {
    if (!rq.valid && block == next()) {
      int64_t* const to = keys + held;
      for (int64_t x = 0; x < n; ++x) to[x] = a + x;
      held += n;
      return;
    }
    for (int64_t x = 0; x < n; ++x)
      if (!rq.valid || rq.valid[a + x]) hold(block + x * kLanes, a + x);
  }

  // Adds what is held. `m` are the running maxima.
  void flush(const float* m) {
    rescale(m);
    vi huge = {};
    for (int r = 0; r < kLanes; r += W) {
      const vf top = load(at + r), shift = top == -kInf ? vf{} : -top * unit;
      store(minus_top + r, shift);
      huge |= (shift > 1048576.0f) | (shift < -1048576.0f);
    }
    if (any_set(huge)) {  // where the rounding of the product could push an exponent over the top
      for (int64_t x = 0; x < held * kLanes; ++x)
        s[x] -= at[x % kLanes] == -kInf ? 0.0f : at[x % kLanes];
      for (int r = 0; r < kLanes; ++r) minus_top[r] = 0.0f;
    }
    for (int64_t x = 0; x < held; x += kLanes) {
      const int64_t n = held - x < kLanes ? held - x : kLanes;
      E::values(s + x * kLanes, n, keys + x, v, p.v.row, p.Dv, unit, minus_top, vectors, l, packed,
                wide, ot);
    }
    held = 0;
  }

  // Writes `rows` rows of the output, each times its factor, to `out`; zeros where that is
  // negative.
  void write(int64_t rows, const float* factor, T* out, int64_t stride) {
    for (int64_t r = 0; r < rows; r += W) {
      const float* o = ot + (r / kGroupLanes) * p.Dv * kGroupLanes + r % kGroupLanes;
      const vf scale = load(factor + r);
      float* const row = wide + r * p.Dv;
      for (int64_t d = 0; d < p.Dv; d += W) {
        vi x[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i)
          x[i] = d + i < p.Dv ? (vi)(scale < 0.0f ? vf{} : load(o + (d + i) * kGroupLanes) * scale)
                              : vi{};
        transpose(x);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
          float* const to = row + i * p.Dv + d;
          if (d + W <= p.Dv)
            store(to, (vf)x[i]);
          else
            memcpy(to, &x[i], (p.Dv - d) * 4);
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r) narrow(wide + r * p.Dv, p.Dv, out + r * stride);
  }

 private:
  // Weights are relative to `at`, which follows the running max only once that is 2^8 ahead: most
  // maxima rise by little, and rescaling the output for each would cost more than the few bits of
  // range.
  void rescale(const float* m) {
    vi ahead = {};
    for (int r = 0; r < kLanes; r += W) ahead |= (load(m + r) - load(at + r)) * unit > 8.0f;
    if (!any_set(ahead)) return;
    alignas(64) float factor[kLanes];
    bool empty = true;
    for (int r = 0; r < kLanes; ++r) {
      const bool far = (m[r] - at[r]) * unit > 8.0f;
      factor[r] = far ? __builtin_exp2f((at[r] - m[r]) * unit) : 1.0f;
      empty = empty && (!far || at[r] == -kInf);
      if (far) at[r] = m[r];
    }
    for (int r = 0; r < kLanes; ++r) l[r] *= factor[r];
    if (empty) return;  // nothing has been added in the lanes that moved
    for (int g = 0; g < kGroups; ++g)
      for (int64_t d = 0; d < p.Dv; ++d)
        for (int j = 0; j < NR; ++j) {
          float* o = ot + (g * p.Dv + d) * kGroupLanes + j * W;
          store(o, load(o) * load(factor + g * kGroupLanes + j * W));
        }
  }
};

}  // namespace bsa::BSA_LEVEL
