// Prefill: the work is done by block rows, of one query head and at most 64 queries each.
//
// A block row walks the key blocks in the order of the geometry, in steps of one block or, for
// smaller blocks, of 64 keys: scores of the step, mask, votes. What is kept is compacted and added
// to the output 64 keys at a time (kept.h). A skipped key therefore costs its scores only, or less
// where the int8 filter proves beforehand that it will be skipped.
#pragma once
#include "filter.h"
#include "kept.h"
#include "visits.h"
#include "vote_keys.h"

namespace bsa::BSA_LEVEL {

// Scratch that AMX tiles may read and write: 16 rows at a time.
constexpr int64_t in_tiles(int64_t rows) { return (rows + 15) / 16 * 16; }

template <class E>
struct Prefill {
  using T = typename E::Element;
  const Problem& p;
  const BlockRow row;
  const Request& rq;
  const ScoreUnits units;
  const int vectors;  // that hold rows; the lanes behind them are never looked at
  const T *q, *k;
  // Scratch.
  char *qt, *int8_q;
  T* few;                         // the rows of K that the filter could not rule out
  alignas(64) float top[kLanes];  // the maxima of the step
  KeyVote vote;
  Kept<E> kept;
  Filter<T> filter;
  int64_t at = 0, last = 0;  // blocks [at, last) are left
  int64_t visited = 0, skipped = 0;
  bool keeps = true;  // the last step whose scores were computed kept some of its keys

  Prefill(const Problem& p_, int64_t b, int64_t h, int64_t i)
      : p(p_),
        row(p_, b, h, i),
        rq(row.rq),
        units(p_),
        vectors(int((row.rows + W - 1) / W)),
        kept(p_, row.rq, units.unit, vectors) {}

  // Visits the sink and the diagonal, where the order has them first; `advance` does the rest.
  void begin(char* scratch) {
    if (row.rows <= 0) return;
    const int64_t b = row.b, h = row.h;
    q = row_of<T>(p.q, b, h, row.row0);
    k = row_of<T>(p.k, b, h / p.G, rq.first);
    kept.v = row_of<T>(p.v, b, h / p.G, rq.first);
    layout(scratch);
    // Rows of other positions lie far apart; asked for together, their waits overlap.
    for (int64_t r = 0; r < row.rows; ++r) fetch_row(q + r * p.q.row, p.D);
    for (int64_t c = row.key_lo; c < row.key_hi && c < row.key_lo + kLanes; ++c)
      fetch_row(k + c * p.k.row, p.D);
    const float q_max = E::pack_q(q, p.q.row, row.rows, p.D, qt);
    kept.start();
    const bool finite = p.any_rule && products_are_finite(q_max);
    vote.start(p, RowRule::of(p, b, h, row.i, units.unit), units.unit, row.voters, finite);
    if (p.planes.data && finite && !rq.before && units.trivial())
      filter.offer(p, b, h, row.row0, row.rows, int8_q);
    walk_first();
  }

  // Goes on to key `until`, a multiple of the blocks and of 64; false once there is nothing left.
  bool advance(int64_t until) {
    const int64_t stop = until / p.block_k;
    walk(stop < last ? stop : last);
    return at < last;
  }

  void end() {
    if (row.rows <= 0) return;
    if (kept.held) kept.flush(vote.m);
    finish();
  }

 private:
  void layout(char* scratch) {
    auto take = [&](size_t bytes) {
      char* at = scratch;
      scratch += (bytes + 63) / 64 * 64;
      return at;
    };
    const int64_t step = p.block_k > kLanes ? p.block_k : kLanes;
    qt = take(kLanes * p.D * 4);
    kept.ot = reinterpret_cast<float*>(take(kLanes * in_tiles(p.Dv) * 4));
    kept.s = reinterpret_cast<float*>(take((kLanes + step) * kLanes * 4));
    kept.packed = take(kLanes * kLanes * 2);
    kept.wide = reinterpret_cast<float*>(take(kLanes * in_tiles(p.D > p.Dv ? p.D : p.Dv) * 4));
    kept.keys = reinterpret_cast<int64_t*>(take((kLanes + step) * 8));
    int8_q = take(Filter<T>::bytes(p));
    few = reinterpret_cast<T*>(take(kLanes * p.D * 4));
  }

  // Only if no product can overflow is every score a number, and the max of a block tells about all
  // of them.
  bool products_are_finite(float q_max) const {
    const double most = double(q_max) * p.k_max[row.b * p.Hkv + row.h / p.G] * double(p.D);
    return most < 1e38 && most * (p.scale < 0 ? -p.scale : p.scale) < 1e38;
  }

  void walk_first() {
    if (row.key_lo >= row.key_hi) return;
    const int64_t lo = row.key_lo / p.block_k, hi = (row.key_hi - 1) / p.block_k + 1;
    if (p.order == kDescending) {
      for (int64_t j = hi; j-- > lo;) step(j, j + 1);
      return;
    }
    const Visits visits(p.order, lo, hi, row.diag_lo, row.diag_hi);
    for (int r = 0; r < visits.runs; ++r) {
      at = visits.lo[r];
      last = visits.hi[r];
      if (r + 1 < visits.runs) walk(last);
    }
  }

  void walk(int64_t stop) {
    const int64_t at_once = p.block_k < kLanes ? kLanes / p.block_k : 1;
    while (at < stop) {
      const int64_t next = (at / at_once + 1) * at_once;  // steps lie in the chunks of the filter
      const int64_t from = at;
      at = next < last ? next : last;
      step(from, at);
    }
  }

  // Scores and votes for blocks [j0, j1).
  void step(int64_t j0, int64_t j1) {
    const int64_t c0 = j0 * p.block_k;
    const int64_t c1 = j1 * p.block_k < row.key_hi ? j1 * p.block_k : row.key_hi;
    if (row.count(c0, c1) == 0) return;
    if (filter.worth_trying() && filtered(j0, j1, c0, c1 - c0)) return;
    const int64_t skipped_before = skipped;
    float* const fresh = kept.next();
    score(fresh, c0, c1 - c0);
    if (!vote.active) {
      visited += row.count_blocks(j0, j1, c1);
      vote.raise(top);
      kept.hold(fresh, c0, c1 - c0);
    } else if (p.block_k == 1) {
      decide_keys(fresh, c0, c1 - c0);
    } else {
      decide_blocks(fresh, j0, j1, c1);
    }
    settle();
    keeps = skipped - skipped_before < j1 - j0;
    filter.saw(float(skipped - skipped_before) / float(j1 - j0));
  }

  // Adds what is kept to the output, if that is enough of it or if the votes wait for it.
  void settle() {
    if (kept.held < kLanes && !vote.behind) return;
    kept.flush(vote.m);
    if (vote.budgeted) vote.catch_up(kept.l, kept.at);
  }

  void decide_keys(float* fresh, int64_t c0, int64_t n) {
    const uint64_t all = low_bits(n);
    uint64_t seen = all, forced = 0;
    if (rq.valid) seen = keys_where(n, [&](int64_t x) { return rq.valid[c0 + x] != 0; });
    if (row.forced(c0, c0 + n))
      forced = keys_where(n, [&](int64_t x) { return row.forced(c0 + x); });
    const uint64_t keep = vote.decide(fresh, n, seen, forced & seen, top);
    visited += __builtin_popcountll(seen);
    skipped += __builtin_popcountll(seen & ~keep);
    if (keep == all) {
      kept.hold(fresh, c0, n);
      return;
    }
    for (uint64_t left = keep; left; left &= left - 1) {
      const int64_t x = __builtin_ctzll(left);
      kept.hold(fresh + x * kLanes, c0 + x);
    }
    mark(seen & ~keep, c0);
  }

  void decide_blocks(float* fresh, int64_t j0, int64_t j1, int64_t c1) {
    for (int64_t j = j0; j < j1; ++j) {
      const int64_t a = j * p.block_k, e = a + p.block_k < c1 ? a + p.block_k : c1;
      if (rq.before && row.count(a, e) == 0) continue;
      float* const block = fresh + (a - j0 * p.block_k) * kLanes;
      if (j1 - j0 > 1) gather_top(block, e - a);
      if (vote.behind) settle();
      ++visited;
      if (!row.forced(j) && Vote::skip(vote, top)) {
        ++skipped;
        row.mark(j);
      } else {
        Vote::keep(vote, top);
        kept.hold(block, a, e - a);
      }
    }
  }

  // Whether the filter settles the step: all of it is skipped, or a few single keys remain.
  bool filtered(int64_t j0, int64_t j1, int64_t c0, int64_t n) {
    if (row.forced(j0, j1)) return false;
    uint64_t open = 0;
    for (int64_t c = c0; c < c0 + n && !open; c += kLanes - c % kLanes) {
      open = filter.open_keys(c / kLanes, vote.bound, p.block_k > 1) >> (c % kLanes);
      if (c0 + n - c < kLanes) open &= low_bits(c0 + n - c);
    }
    const int64_t left = __builtin_popcountll(open);
    const bool single = p.block_k == 1 && 4 * left <= 3 * n && !row.is_edge(c0, n);
    filter.report(!open || (single && 2 * left <= n));
    if (open && !single) return false;
    visited += j1 - j0;
    skipped += j1 - j0 - left;
    mark(low_bits(j1 - j0) & ~open, j0);
    filter.saw(1.0f - float(left) / float(n));
    if (open) decide_few(open, left, c0);
    return true;
  }

  // The single keys c0 + x for each bit x of `open`, which are `n`.
  void decide_few(uint64_t open, int64_t n, int64_t c0) {
    int64_t keys[kLanes], x = 0;
    for (; open; open &= open - 1, ++x) {
      keys[x] = c0 + __builtin_ctzll(open);
      memcpy(few + x * p.D, k + keys[x] * p.k.row, p.D * sizeof(T));
    }
    float* const fresh = kept.next();
    E::scores(few, p.D, n, qt, p.D, vectors, kept.wide, fresh, top);
    const uint64_t keep = vote.decide(fresh, n, low_bits(n), 0, top);
    skipped += n - __builtin_popcountll(keep);
    for (x = 0; x < n; ++x)
      if (keep >> x & 1)
        kept.hold(fresh + x * kLanes, keys[x]);
      else
        row.mark(keys[x]);
    settle();
  }

  void score(float* fresh, int64_t c0, int64_t n) {
    for (int64_t x = 0; x < n; x += kLanes) {
      const int64_t m = n - x < kLanes ? n - x : kLanes;
      // K and V of a long input lie far away: V of these keys will be needed next if they are kept,
      // and most likely K of the 64 after them. V has no order that the processor could foresee.
      const auto ahead = [&](int64_t i, int64_t count) {
        for (const int64_t end = i + count; i < end; ++i) {
          const int64_t key = c0 + x + i;
          if (keeps) kept.fetch(key);
          if (key + kLanes < row.key_hi) fetch_row(k + (key + kLanes) * p.k.row, p.D);
        }
      };
      alignas(64) float part[kLanes];
      E::scores(k + (c0 + x) * p.k.row, p.k.row, m, qt, p.D, vectors, kept.wide, fresh + x * kLanes,
                x ? part : top, ahead);
      if (x)
        for (int j = 0; j < kLanes; j += W) store(top + j, vmax(load(part + j), load(top + j)));
    }
    const bool masked = row.is_edge(c0, n) || row.count(c0, c0 + n) < n;
    if (!units.trivial())
      for (int64_t x = 0; x < n * kLanes; x += W)
        store(fresh + x, ScoreUnits::apply(units, load(fresh + x)));
    if (masked) row.mask(fresh, c0, n);
    if (masked || !units.trivial()) gather_top(fresh, n);
  }

  void gather_top(const float* block, int64_t n) {
    vf t[kVectors];
    for (int r = 0; r < kVectors; ++r) t[r] = load(block + r * W);
    for (int64_t x = 1; x < n; ++x)
      for (int r = 0; r < kVectors; ++r) t[r] = vmax(t[r], load(block + x * kLanes + r * W));
    for (int r = 0; r < kVectors; ++r) store(top + r * W, t[r]);
  }

  // Blocks j0 + x are recorded as skipped, for each bit x.
  void mark(uint64_t bits, int64_t j0) const {
    if (!p.skips) return;
    for (; bits; bits &= bits - 1) row.mark(j0 + __builtin_ctzll(bits));
  }

  template <class F>
  static uint64_t keys_where(int64_t n, const F& f) {
    uint64_t bits = 0;
    for (int64_t x = 0; x < n; ++x) bits |= uint64_t(f(x)) << x;
    return bits;
  }

  void finish() {
    const float* sink = p.sinks ? p.sinks + row.h : nullptr;
    float* const lse = p.lse + (row.b * p.Hq + row.h) * p.Lq + row.row0;
    T* const out = static_cast<T*>(p.out) + ((row.b * p.Lq + row.row0) * p.Hq + row.h) * p.Dv;
    alignas(64) float factor[kLanes];
    for (int64_t r = 0; r < row.rows; ++r) {
      const bool sees = row.sees(r);
      const float log_c = vote.track && vote.c[r] > 0
                              ? __builtin_log2f(vote.c[r]) + vote.at[r] * units.unit
                              : -kInf;
      const RowEnd end = end_row(kept.at[r] * units.unit, kept.l[r], log_c, sees, sink);
      lse[r] = end.lse;
      if (p.dropped) p.dropped[lse + r - p.lse] = end.dropped;
      factor[r] = sees ? end.factor : -1.0f;
    }
    kept.write(row.rows, factor, out, p.Hq * p.Dv);
    if (!row.counted) return;
    int64_t* const counts = p.counts + (row.b * p.Hq + row.h) * 2;
    __atomic_fetch_add(counts, visited, __ATOMIC_RELAXED);
    __atomic_fetch_add(counts + 1, skipped, __ATOMIC_RELAXED);
  }
};

}  // namespace bsa::BSA_LEVEL
