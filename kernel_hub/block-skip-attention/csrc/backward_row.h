// Backward: one task is one block row of one query head, at most 64 queries, as in the forward.
//
// It walks the keys that the forward kept, in chunks of 64, computes their weights anew from the
// forward's lse, and adds what they give to dQ, which is its own, and to dK and dV, which it shares
// with all tasks of the key/value head. Those sums are made in the order of the tasks, whichever
// thread runs them: a task adds to a chunk only after the task before it has passed that chunk.
// Long rows come first, so the tasks that run at the same time soon stand at different chunks, and
// rarely wait.
#pragma once
#include <sched.h>

#include "backward_bf16.h"

namespace bsa::BSA_LEVEL {

// Cuts scratch memory into pieces; without memory it only counts.
class Pieces {
 public:
  explicit Pieces(char* start) : start_(start) {}
  float* operator()(int64_t floats) {
    char* const here = start_ + bytes;
    bytes += (size_t(floats) * 4 + 63) / 64 * 64;
    return reinterpret_cast<float*>(here);
  }
  size_t bytes = 0;

 private:
  char* start_;
};

template <class E>
struct BackwardRow {
  using T = typename E::Element;
  static constexpr int64_t kFinished = INT64_MAX;
  const Backward& p;
  const Request& rq;
  const int64_t b, h, i;
  int64_t* const own;  // this task's progress; that of the one before lies before it
  const bool first;
  E engine;
  Weights weights;
  int64_t row0, rows;
  float* dqt;

  // Task t of the key/value head `kv_head`: block rows from the last to the first, and within them
  // the heads of the group.
  BackwardRow(const Backward& p_, int64_t b_, int64_t kv_head, int64_t t)
      : p(p_),
        rq(p_.requests[b_]),
        b(b_),
        h(kv_head * p_.G + t % p_.G),
        i(p_.NQ - 1 - t / p_.G),
        own(p_.progress + (b_ * p_.Hkv + kv_head) * p_.NQ * p_.G + t),
        first(t == 0),
        engine(p_),
        weights(p_) {}

  void run(char* scratch) {
    const int64_t step = p.decode() ? 1 : p.block_q;
    row0 = rq.first_row + i * step;
    rows = p.Lq - row0 < step ? p.Lq - row0 : step;
    if (rows > 0) {
      layout(scratch);
      start();
      walk();
      finish();
    }
    wait_until(kFinished);
    pass(kFinished);
  }

  size_t layout(char* scratch) {
    Pieces take(scratch);
    dqt = take(kLanes * p.D);
    engine.layout(take);
    return take.bytes;
  }

 private:
  void start() {
    bool sees[kLanes];
    const T* const out = static_cast<const T*>(p.kept_out);
    const T* const dout = row_of<T>(p.dout, b, h, row0);
    const float* const lse = p.kept_lse + (b * p.Hq + h) * p.Lq + row0;
    const float* const dlse = p.dlse ? p.dlse + (b * p.Hq + h) * p.Lq + row0 : nullptr;
    double sink_grad = 0;
    for (int64_t r = 0; r < kLanes; ++r) {
      sees[r] = r < rows && lse[r] != -kInf;
      weights.minus_lse[r] = sees[r] ? -lse[r] * kLog2e : -kInf;
      weights.delta[r] = 0;
      if (!sees[r]) continue;
      const T* const o = out + ((b * p.Lq + row0 + r) * p.Hq + h) * p.Dv;
      weights.delta[r] = dot(dout + r * p.dout.row, o, p.Dv) - (dlse ? dlse[r] : 0.0f);
      if (p.sinks) sink_grad -= __builtin_expf(p.sinks[h] - lse[r]) * weights.delta[r];
    }
    if (p.sinks) p.sink_parts[(b * p.Hq + h) * p.NQ + i] = float(sink_grad);
    weights.pos0 = rq.offset + row0;
    engine.take_queries(row_of<T>(p.q, b, h, row0), dout, rows, sees);
    memset(dqt, 0, kLanes * p.D * sizeof(float));
  }

  static float dot(const T* a, const T* b, int64_t n) {
    vf sum = {};
    int64_t d = 0;
    for (; d + W <= n; d += W) sum += load_floats(a + d) * load_floats(b + d);
    float total = 0;
    for (int j = 0; j < W; ++j) total += sum[j];
    for (; d < n; ++d) total += to_float(a[d]) * to_float(b[d]);
    return total;
  }

  void walk() {
    const int64_t pos0 = weights.pos0, pos1 = pos0 + rows, n = rq.keys();
    const int64_t key_hi = p.causal && pos1 < n ? pos1 : n;
    const int64_t key_lo = p.window && pos0 - p.window + 1 > 0 ? pos0 - p.window + 1 : 0;
    const int vectors = int((rows + W - 1) / W);
    const T* const k = row_of<T>(p.k, b, h / p.G, rq.first);
    const T* const v = row_of<T>(p.v, b, h / p.G, rq.first);
    for (int64_t c0 = key_lo / kLanes * kLanes; c0 < key_hi; c0 += kLanes) {
      const int64_t end = c0 + kLanes < key_hi ? c0 + kLanes : key_hi;
      int64_t keys[kLanes];
      const int64_t kept = collect(c0 > key_lo ? c0 : key_lo, end, keys);
      const int64_t chunk = c0 / kLanes + 1;
      if (kept == 0) {
        if (is_past(chunk)) pass(chunk);
        continue;
      }
      engine.take_keys(k, v, keys, kept);
      engine.weigh(weights, keys, kept, vectors);
      engine.add_to_queries(kept, vectors, dqt);
      wait_until(chunk);
      float *dk[kLanes], *dv[kLanes];
      for (int64_t x = 0; x < kept; ++x) {
        const int64_t row = (b * p.Hkv + h / p.G) * p.Lk + rq.first + keys[x];
        dk[x] = p.key_sums + row * p.key_width(), dv[x] = dk[x] + p.k_width();
      }
      engine.add_to_keys(kept, rows, dk, dv);
      pass(chunk);
    }
  }

  // The keys in [lo, hi), within one chunk, that are valid and not in a block that was skipped.
  int64_t collect(int64_t lo, int64_t hi, int64_t* keys) const {
    const int64_t voter = p.decode() ? b * p.Hkv + h / p.G : b * p.Hq + h;
    const uint8_t* const bits =
        p.skip_bits ? p.skip_bits + (voter * p.NQ + i) * p.skip_bytes : nullptr;
    int64_t n = 0;
    for (int64_t a = lo, next; a < hi; a = next) {
      const int64_t j = a / p.block_k;
      next = (j + 1) * p.block_k < hi ? (j + 1) * p.block_k : hi;
      if (bits && (bits[j / 8] >> (j % 8) & 1)) continue;
      for (int64_t c = a; c < next; ++c)
        if (!rq.valid || rq.valid[c]) keys[n++] = c;
    }
    return n;
  }

  void pass(int64_t chunks) { __atomic_store_n(own, chunks, __ATOMIC_RELEASE); }
  // Whether the task before this one has passed so many chunks.
  bool is_past(int64_t chunks) const {
    return first || __atomic_load_n(own - 1, __ATOMIC_ACQUIRE) >= chunks;
  }
  void wait_until(int64_t chunks) const {
    while (!is_past(chunks)) sched_yield();
  }

  void finish() {
    alignas(64) float row[512];
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = dqt + (r / kGroupLanes) * p.D * kGroupLanes + r % kGroupLanes;
      for (int64_t d = 0; d < p.D; ++d) row[d] = from[d * kGroupLanes] * p.scale;
      narrow(row, p.D, static_cast<T*>(p.dq) + ((b * p.Hq + h) * p.Lq + row0 + r) * p.D);
    }
  }
};

// Calls run<E>() with the engine that serves elements T at this level.
template <class T, class Run>
BSA_INLINE auto with_gradients(const Backward& p, const Run& run) {
#if BSA_ISA >= 3
  if constexpr (__is_same(T, bf16))
    if (Bf16Gradients::serves(p)) return run.template operator()<Bf16Gradients>();
#endif
  (void)p;
  return run.template operator()<FloatGradients<T>>();
}

template <class T>
void backward_row(const Backward& p, int64_t bh, int64_t t, char* scratch) {
  with_gradients<T>(p,
                    [&]<class E>() { BackwardRow<E>(p, bh / p.Hkv, bh % p.Hkv, t).run(scratch); });
}

template <class T>
size_t backward_scratch(const Backward& p) {
  return with_gradients<T>(p,
                           [&]<class E>() { return BackwardRow<E>(p, 0, 0, 0).layout(nullptr); });
}

// Gradients of key `c` of a key/value head, from its sums.
template <class T>
void backward_key(const Backward& p, int64_t bh, int64_t c) {
  const int64_t key = bh * p.Lk + c;
  float* const sums = p.key_sums + key * p.key_width();
  for (int64_t d = 0; d < p.D; ++d) sums[d] *= p.scale;
  narrow(sums, p.D, static_cast<T*>(p.dk) + key * p.D);
  narrow(sums + p.k_width(), p.Dv, static_cast<T*>(p.dv) + key * p.Dv);
}

}  // namespace bsa::BSA_LEVEL
