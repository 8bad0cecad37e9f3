// Observing: one task is one block row of all heads of a group. Each head's dense attention is
// computed 64 keys at a time, and what votes would need is taken down on the way:
//
//   single keys   in the order of their visits, while their scores are at hand (observe_keys.h)
//   blocks        from 64 keys' maxima and sums, when the row is done       (observe_blocks.h)
//   decode        from the last query's scores, when the group is done     (observe_decode.h)
//
// Scores of block 0 and of the diagonal are held together at first: single keys are visited 0,
// diagonal, 1, 2, and so on. Memory is linear in the length.
#pragma once
#include "block_row.h"
#include "kept.h"
#include "observe_blocks.h"
#include "observe_decode.h"
#include "observe_keys.h"

namespace bsa::BSA_LEVEL {

// The scratch of a task.
struct ObserveMemory {
  char *qt, *packed;
  float *ot, *s, *wide, *top, *sum, *bin_mass, *tops, *last, *last_mass, *decode;
  int64_t* keys;
  Tally* tally;
  int64_t stride;  // keys, and room for a vector behind them
  size_t bytes;

  ObserveMemory(const Problem& p, const Observe& o, char* base) {
    bytes = 0;
    const auto take = [&]<class X>(X*& x, size_t size) {
      x = reinterpret_cast<X*>(reinterpret_cast<uintptr_t>(base) + bytes);
      bytes += (size + 63) / 64 * 64;
    };
    const size_t widest = p.D > p.Dv ? p.D : p.Dv, chunks = (p.Lk + kLanes - 1) / kLanes;
    stride = chunks * kLanes + W;
    take(qt, kLanes * p.D * 4);
    take(ot, kLanes * p.Dv * 4);
    take(s, 2 * kLanes * kLanes * 4);
    take(packed, kLanes * kLanes * 2);
    take(wide, kLanes * widest * 4);
    take(keys, 2 * kLanes * 8);
    take(top, chunks * kLanes * 4);
    take(sum, chunks * kLanes * 4);
    take(bin_mass, o.bins * kLanes * 4);
    take(tops, stride * 4);
    take(last, p.G * stride * 4);
    take(last_mass, p.G * 4);
    take(decode, DecodeMemory::floats(p.G, stride) * 4);
    take(tally, sizeof(Tally));
  }
};

template <class E>
class ObserveHead {
  using T = typename E::Element;

 public:
  ObserveHead(const Problem& p, const Observe& o, const ObserveMemory& memory, int64_t h, int64_t i)
      : p_(p),
        o_(o),
        at_(memory),
        row_(p, 0, h, i),
        units_(p),
        bins_(o, units_.unit, p.window && p.window < p.Lq ? p.window : p.Lq),
        vectors_(int((row_.rows + W - 1) / W)),
        kept_(p, row_.rq, units_.unit, vectors_) {}

  // `last_scores` [keys] and `last_mass` are filled for decode.
  void run(float* last_scores, float* last_mass) {
    last_ = last_scores;
    for (int g = 0; g < o_.geometries; ++g)
      if (o_.geometry[g].block_k == 1) single_ = &o_.geometry[g];
    start();
    const int64_t first = row_.key_lo / kLanes, diagonal = row_.i;
    if (first == 0 && diagonal > 0) score(0);
    const int64_t sink = first == 0 && diagonal > 0 ? kept_.held : 0;
    score(diagonal);
    // Keys in the order of their visits, as places among those held.
    const int64_t held = kept_.held, one = sink > 0 && row_.key_lo == 0;
    const int64_t runs[][2] = {{0, one}, {sink, held}, {one, sink}};
    settle(runs, 3);
    for (int64_t c = first > 1 ? first : 1; c < diagonal; ++c) {
      score(c);
      const int64_t run[][2] = {{0, kept_.held}};
      settle(run, 1);
    }
    finish(last_mass);
  }

 private:
  void start() {
    kept_.ot = at_.ot, kept_.s = at_.s, kept_.wide = at_.wide, kept_.packed = at_.packed,
    kept_.keys = at_.keys;
    kept_.v = row_of<T>(p_.v, 0, row_.h / p_.G, 0);
    k_ = row_of<T>(p_.k, 0, row_.h / p_.G, 0);
    E::pack_q(row_of<T>(p_.q, 0, row_.h, row_.row0), p_.q.row, row_.rows, p_.D, at_.qt);
    kept_.start();
    for (int r = 0; r < kLanes; ++r) m_[r] = -kInf;
    keys_.tally = at_.tally, keys_.bin_mass = at_.bin_mass;
    keys_.start(o_, &bins_, single_ ? o_.weight(1, row_.i) : 0);
  }

  // The scores of chunk c join those held.
  void score(int64_t c) {
    const int64_t c0 = c * kLanes > row_.key_lo ? c * kLanes : row_.key_lo;
    const int64_t c1 = (c + 1) * kLanes < row_.key_hi ? (c + 1) * kLanes : row_.key_hi, n = c1 - c0;
    float* const s = kept_.next();
    float* const top = at_.top + c * kLanes;
    E::scores(k_ + c0 * p_.k.row, p_.k.row, n, at_.qt, p_.D, vectors_, at_.wide, s, top);
    const bool edge = row_.is_edge(c0, n);
    if (!units_.trivial())
      for (int64_t x = 0; x < n * kLanes; x += W)
        store(s + x, ScoreUnits::apply(units_, load(s + x)));
    if (edge) row_.mask(s, c0, n);
    if (edge || !units_.trivial()) {
      vf most[kVectors];
      for (int j = 0; j < kVectors; ++j) most[j] = splat(-kInf);
      for (int64_t x = 0; x < n; ++x)
        for (int j = 0; j < kVectors; ++j) most[j] = vmax(load(s + x * kLanes + j * W), most[j]);
      for (int j = 0; j < kVectors; ++j) store(top + j * W, most[j]);
    }
    for (int64_t x = 0; x < n; ++x) last_[c0 + x] = s[x * kLanes + row_.rows - 1];
    part_[parts_++] = {c, c0, n};
    kept_.hold(s, c0, n);
  }

  // Everything about the keys held: votes on single keys, their values, their weights.
  void settle(const int64_t (*runs)[2], int n_runs) {
    const int64_t held = kept_.held;
    alignas(64) float tops[2 * kLanes + W];
    if (single_) {
      for (int i = 0; i < n_runs; ++i) keys_.visit(at_.s, runs[i][0], runs[i][1], m_, tops);
      for (int64_t x = 0; x < held; ++x) at_.tops[at_.keys[x]] = tops[x];
    } else {
      for (int i = 0; i < parts_; ++i)
        for (int j = 0; j < kLanes; j += W)
          store(m_ + j, vmax(load(at_.top + part_[i].chunk * kLanes + j), load(m_ + j)));
    }
    alignas(64) float before[kLanes];
    memcpy(before, kept_.at, sizeof(before));
    kept_.flush(m_);
    if (!E::weights_in_place) {
      alignas(64) float unused[kLanes] = {};
      exponentials(at_.s, held, units_.unit, kept_.minus_top, unused);
    }
    rescale(before);
    int64_t from = 0;
    for (int i = 0; i < parts_; ++i) {
      sum(part_[i], at_.s + from * kLanes);
      from += part_[i].n;
    }
    if (single_) {
      keys_.weigh(at_.s, held);
      const float* all = parts_ == 1 ? sums_ : nullptr;
      for (int i = 0; i < n_runs; ++i) keys_.spend(at_.s, runs[i][0], runs[i][1], all);
    }
    parts_ = 0;
  }

  void rescale(const float* before) {
    if (!single_ || memcmp(before, kept_.at, sizeof(kept_.at)) == 0) return;
    alignas(64) float factor[kLanes];
    for (int r = 0; r < kLanes; ++r)
      factor[r] = before[r] == kept_.at[r]
                      ? 1.0f
                      : __builtin_exp2f((before[r] - kept_.at[r]) * units_.unit);
    keys_.rescale(factor);
  }

  struct Part {
    int64_t chunk, key, n;
  };

  // A chunk's weights relative to its own largest score: at least 1 where a lane sees any of it.
  void sum(const Part& part, const float* weights) {
    for (int j = 0; j < kLanes; j += W) {
      vf total = {};
      for (int64_t x = 0; x < part.n; ++x) total += load(weights + x * kLanes + j);
      store(sums_ + j, total);
      const vf top = load(at_.top + part.chunk * kLanes + j), ref = load(kept_.at + j);
      // vmax returns 1 for 0 * inf: a chunk too far below to have weights here.
      vf own = vmax(total * exp2v((ref - top) * units_.unit), splat(1.0f));
      own = own > float(kLanes) ? splat(float(kLanes)) : own;
      store(at_.sum + part.chunk * kLanes + j, top == -kInf ? vf{} : own);
    }
  }

  void finish(float* last_mass) {
    const float* sink = p_.sinks ? p_.sinks + row_.h : nullptr;
    T* const out = static_cast<T*>(p_.out) + (row_.row0 * p_.Hq + row_.h) * p_.Dv;
    alignas(64) float log_mass[kLanes], worth[kLanes], factor[kLanes];
    for (int64_t r = 0; r < kLanes; ++r) {
      log_mass[r] = kInf, worth[r] = 0;
      if (r >= row_.rows) continue;
      const float at = kept_.at[r] * units_.unit;
      const RowEnd end = end_row(at, kept_.l[r], -kInf, true, sink);
      factor[r] = end.factor;
      log_mass[r] = end.lse / kLn2;
      worth[r] = __builtin_exp2f(at - log_mass[r]) / float(row_.rows);
    }
    kept_.write(row_.rows, factor, out, p_.Hq * p_.Dv);
    *last_mass = log_mass[row_.rows - 1];
    const float natural = units_.unit * kLn2;
    if (single_) {  // first, as the others need the room
      keys_.finish(worth, single_->prefill + row_.h * o_.width);
      midpoints(*single_, row_.key_lo, row_.row0, natural);
    }
    for (int g = 0; g < o_.geometries; ++g) {
      const Observed& geometry = o_.geometry[g];
      if (&geometry == single_) continue;
      const Chunks chunks = {at_.top,    at_.sum,  row_.key_lo / kLanes,
                             row_.i + 1, log_mass, row_.rows};
      BlockObserver(o_, geometry, chunks, units_.unit, bins_, at_.tally).run(at_.tops);
      at_.tally->flush(o_, 1, geometry.prefill + row_.h * o_.width);
      midpoints(geometry, row_.key_lo / geometry.block_k, row_.row0 / geometry.block_k, natural);
    }
  }

  // Of the blocks [first, diagonal), which compete but for the sink.
  void midpoints(const Observed& g, int64_t first, int64_t diagonal, float natural) {
    if (row_.rows < kLanes) return;
    const int64_t from = first == 0 && o_.keep_sink ? 1 : first;
    store_midpoints(o_, g, at_.tops + from, diagonal > from ? diagonal - from : 0, natural,
                    g.prefill_tops + row_.h * o_.positions + row_.i, p_.Hq * o_.positions);
  }

  const Problem& p_;
  const Observe& o_;
  const ObserveMemory& at_;
  const BlockRow row_;
  const ScoreUnits units_;
  const Bins bins_;
  const int vectors_;
  Kept<E> kept_;
  KeyObserver keys_;
  const Observed* single_ = nullptr;
  const T* k_ = nullptr;
  float* last_ = nullptr;
  Part part_[2];
  int parts_ = 0;
  alignas(64) float m_[kLanes], sums_[kLanes];
};

template <class E>
void observe(const Problem& p, const Observe& o, int64_t kv_head, int64_t i, char* scratch) {
  const ObserveMemory memory(p, o, scratch);
  for (int64_t g = 0; g < p.G; ++g)
    ObserveHead<E>(p, o, memory, kv_head * p.G + g, i)
        .run(memory.last + g * memory.stride, memory.last_mass + g);

  const int64_t end = (i + 1) * kLanes < p.Lq ? (i + 1) * kLanes : p.Lq;
  const int64_t lo = p.window && end > p.window ? end - p.window : 0;
  const float unit = ScoreUnits(p).unit;
  const Bins bins(o, unit, end - lo);
  const LastQueries last = {p.G, lo, end, memory.stride, memory.last, memory.last_mass};
  for (int n = 0; n < o.geometries; ++n) {
    const Observed& g = o.geometry[n];
    const int64_t weight = o.weight(g.block_k, i);
    const DecodeMemory room(memory.decode, p.G, memory.stride);
    float* const tops =
        DecodeObserver(o, g, last, room, unit, bins, weight > 0, memory.tally).run();
    memory.tally->flush(o, weight, g.decode + (o.groups[i] * p.Hkv + kv_head) * o.width);
    if (end - i * kLanes < kLanes) continue;
    const int64_t from = lo / g.block_k == 0 && o.keep_sink ? 1 : lo / g.block_k;
    const int64_t competing = (end - 1) / g.block_k - from;
    store_midpoints(o, g, tops + from, competing > 0 ? competing : 0, unit * kLn2,
                    g.decode_tops + kv_head * o.positions + i, p.Hkv * o.positions);
  }
}

static size_t observe_bytes(const Problem& p, const Observe& o) {
  return ObserveMemory(p, o, nullptr).bytes;
}

}  // namespace bsa::BSA_LEVEL
