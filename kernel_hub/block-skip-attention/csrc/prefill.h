// Prefill: one task is one block row of one query head, at most 64 queries.
//
// It walks the key blocks in the order of the geometry, in steps of one block or, for smaller
// blocks, of 64 keys: scores of the step, mask, vote block by block. Scores of kept keys are
// compacted into a buffer, in place; when it holds 64 keys their exponentials and products with V
// are added. A skipped key therefore costs its scores only, or less where the int8 filter proves
// beforehand that it will be skipped.
#pragma once
#include "filter.h"
#include "finish.h"
#include "tile.h"
#include "units.h"
#include "visits.h"

namespace bsa::BSA_LEVEL {

template <class E>
struct Prefill {
  using T = typename E::Element;
  const Problem& p;
  const Request& rq;
  const int64_t b, h, i;
  const ScoreUnits units;
  int64_t row0, rows, pos0, key_lo, key_hi;  // visible to some row: keys [key_lo, key_hi)
  int64_t diag_lo, diag_hi;                  // the blocks that the causal diagonal crosses
  const T *k, *v;
  // Scratch.
  char *qt, *packed, *int8_q;
  float *wide, *s, *ot;
  T* few;  // the rows of K that the filter could not rule out
  int64_t* keys;
  alignas(64) float l[kLanes], at[kLanes];  // sum of weights, and the score they are relative to
  alignas(64) float top[kLanes];
  Vote vote;
  Filter<T> filter;
  int vectors = kVectors;  // that hold rows; the lanes behind them are never looked at
  int64_t held = 0, visited = 0, skipped = 0;
  bool counted = true;

  Prefill(const Problem& p_, int64_t b_, int64_t h_, int64_t i_)
      : p(p_), rq(p_.requests[b_]), b(b_), h(h_), i(i_), units(p_) {}

  void run(char* scratch) {
    row0 = rq.first_row + i * p.block_q;
    rows = p.Lq - row0 < p.block_q ? p.Lq - row0 : p.block_q;
    if (rows <= 0) return;
    vectors = int((rows + W - 1) / W);
    pos0 = rq.offset + row0;
    const int64_t n = rq.keys(), pos1 = pos0 + rows;
    key_hi = p.causal && pos1 < n ? pos1 : n;
    key_lo = p.window && pos0 - p.window + 1 > 0 ? pos0 - p.window + 1 : 0;
    diag_lo = p.causal ? pos0 / p.block_k : 0;
    diag_hi = p.causal ? (pos1 - 1) / p.block_k + 1 : 0;
    k = row_of<T>(p.k, b, h / p.G, rq.first);
    v = row_of<T>(p.v, b, h / p.G, rq.first);
    layout(scratch);
    const float q_max = E::pack_q(row_of<T>(p.q, b, h, row0), p.q.row, rows, p.D, qt);
    memset(ot, 0, kLanes * p.Dv * sizeof(float));
    for (int j = 0; j < kLanes; ++j) l[j] = 0, at[j] = -kInf;
    // Only if no product can overflow is every score a number, and the max of a block tells about
    // all of them.
    const bool finite = p.any_rule &&
                        double(q_max) * p.k_max[b * p.Hkv + h / p.G] * double(p.D) *
                                (p.scale < 0 ? -p.scale : p.scale) <
                            1e38 &&
                        double(q_max) * p.k_max[b * p.Hkv + h / p.G] * double(p.D) < 1e38;
    // Right padding has no vote, unless there is nothing else in the block row.
    counted = rq.end_row > row0;
    const int64_t voters = counted && rq.end_row - row0 < rows ? rq.end_row - row0 : rows;
    vote.start(p, RowRule::of(p, b, h, i, units.unit), units.unit, voters, finite);
    if (p.planes.data && finite && !rq.before && units.trivial())
      filter.offer(p, b, h, row0, rows, int8_q);
    walk();
    if (held) flush();
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
    ot = reinterpret_cast<float*>(take(kLanes * p.Dv * 4));
    s = reinterpret_cast<float*>(take((kLanes + step) * kLanes * 4));
    packed = take(kLanes * kLanes * 2);
    wide = reinterpret_cast<float*>(take(kLanes * (p.D > p.Dv ? p.D : p.Dv) * 4));
    keys = reinterpret_cast<int64_t*>(take((kLanes + step) * 8));
    int8_q = take(Filter<T>::bytes(p));
    few = reinterpret_cast<T*>(take(kLanes * p.D * 4));
  }

  void walk() {
    if (key_lo >= key_hi) return;
    const int64_t first = key_lo / p.block_k, last = (key_hi - 1) / p.block_k + 1;
    if (p.order == kDescending) {
      for (int64_t j = last; j-- > first;) step(j, j + 1);
      return;
    }
    const Visits visits(p.order, first, last, diag_lo, diag_hi);
    const int64_t at_once = p.block_k < kLanes ? kLanes / p.block_k : 1;
    for (int r = 0; r < visits.runs; ++r)
      for (int64_t j = visits.lo[r], next; j < visits.hi[r]; j = next) {
        next = (j / at_once + 1) * at_once;  // steps lie in the chunks of the filter
        step(j, next = next < visits.hi[r] ? next : visits.hi[r]);
      }
  }

  // Scores and votes for blocks [j0, j1).
  void step(int64_t j0, int64_t j1) {
    const int64_t c0 = j0 * p.block_k, c1 = j1 * p.block_k < key_hi ? j1 * p.block_k : key_hi;
    const int64_t n = c1 - c0, valid = rq.count(c0 > key_lo ? c0 : key_lo, c1);
    if (valid == 0) return;
    if (filter.worth_trying() && filtered(j0, j1, c0, n)) return;
    const int64_t skipped_before = skipped;
    decide(j0, j1, c0, c1, valid);
    filter.saw(float(skipped - skipped_before) / float(j1 - j0));
  }

  // Whether the filter settles the step: all of it is skipped, or a few single keys remain.
  bool filtered(int64_t j0, int64_t j1, int64_t c0, int64_t n) {
    if (p.threshold.data && ((j0 < diag_hi && j1 > diag_lo) || (j0 == 0 && p.keep_sink)))
      return false;
    uint64_t open = 0;
    for (int64_t c = c0; c < c0 + n && !open; c += kLanes - c % kLanes) {
      open = filter.open_keys(c / kLanes, vote.bound) >> (c % kLanes);
      if (c0 + n - c < kLanes) open &= (uint64_t(1) << (c0 + n - c)) - 1;
    }
    const int64_t left = __builtin_popcountll(open);
    const bool single = p.block_k == 1 && 4 * left <= 3 * n && !is_edge(c0, n);
    filter.report(!open || (single && 2 * left <= n));
    if (open && !single) return false;
    visited += j1 - j0;
    if (p.skips)
      for (int64_t j = j0; j < j1; ++j)
        if (!(open >> (j - j0) & 1)) mark(j);
    skipped += j1 - j0 - left;
    filter.saw(1.0f - float(left) / float(n));
    if (open) decide_few(open, c0);
    return true;
  }

  // The single keys c0 + x for each bit x of `open`, one after the other.
  void decide_few(uint64_t open, int64_t c0) {
    int64_t n = 0, at_key[kLanes];
    for (; open; open &= open - 1) {
      const int64_t c = c0 + __builtin_ctzll(open);
      memcpy(few + n * p.D, k + c * p.k.row, p.D * sizeof(T));
      at_key[n++] = c;
    }
    float* const fresh = s + held * kLanes;
    E::scores(few, p.D, n, qt, p.D, vectors, wide, fresh, top);
    for (int64_t x = 0; x < n; ++x) {
      float* const row = fresh + x * kLanes;
      if (Vote::skip(vote, row)) {
        ++skipped;
        if (p.skips) mark(at_key[x]);
      } else {
        Vote::keep(vote, row, row, 1);
        hold(row, at_key[x], 1);
      }
    }
    if (held >= kLanes) flush();
  }

  void decide(int64_t j0, int64_t j1, int64_t c0, int64_t c1, int64_t valid) {
    const int64_t n = c1 - c0;
    float* const fresh = s + held * kLanes;
    score(fresh, c0, n, valid);
    if (!p.any_rule) {
      visited += rq.before ? count_seen(j0, j1, c1) : j1 - j0;
      Vote::keep(vote, top, fresh, n);
      hold(fresh, c0, n);
      j0 = j1;
    }
    if (j1 - j0 > 1 && decide_together(j0, j1, fresh, c0, n)) return;
    for (int64_t j = j0; j < j1; ++j) {
      const int64_t a = j * p.block_k, e = a + p.block_k < c1 ? a + p.block_k : c1;
      if (rq.before && rq.count(a > key_lo ? a : key_lo, e) == 0) continue;
      float* const block = fresh + (a - c0) * kLanes;
      const float* block_top = top;
      if (e - a == 1) {
        block_top = block;
      } else if (j1 - j0 > 1) {
        gather_top(block, e - a);
      }
      ++visited;
      const bool forced =
          p.threshold.data && ((j >= diag_lo && j < diag_hi) || (j == 0 && p.keep_sink));
      if (!forced && Vote::skip(vote, block_top)) {
        ++skipped;
        if (p.skips) mark(j);
        continue;
      }
      Vote::keep(vote, block_top, block, e - a);
      hold(block, a, e - a);
    }
    if (held >= kLanes) flush();
  }

  // A step of small blocks in which no lane's max rises: the bounds stand still, so no decision
  // depends on another. False if that cannot be said beforehand.
  bool decide_together(int64_t j0, int64_t j1, float* fresh, int64_t c0, int64_t n) {
    if (!vote.active || vote.track || p.threshold.data || rq.before || any_above64(top, vote.m))
      return false;
    visited += j1 - j0;
    const bool all = !any_not_below64(top, vote.bound);
    for (int64_t j = j0; j < j1 && !(all && !p.skips); ++j) {
      const int64_t x = j * p.block_k - c0, size = x + p.block_k < n ? p.block_k : n - x;
      const float* block_top = fresh + x * kLanes;
      if (!all && size > 1) {
        gather_top(fresh + x * kLanes, size);
        block_top = top;
      }
      if (!all && any_not_below64(block_top, vote.bound)) {
        hold(fresh + x * kLanes, c0 + x, size);
        continue;
      }
      if (!all) ++skipped;
      if (p.skips) mark(j);
    }
    if (all) skipped += j1 - j0;
    if (held >= kLanes) flush();
    return true;
  }

  int64_t count_seen(int64_t j0, int64_t j1, int64_t end) const {
    int64_t n = 0;
    for (int64_t j = j0; j < j1; ++j) {
      const int64_t a = j * p.block_k, e = a + p.block_k < end ? a + p.block_k : end;
      n += rq.count(a > key_lo ? a : key_lo, e) > 0;
    }
    return n;
  }

  void score(float* fresh, int64_t c0, int64_t n, int64_t valid) {
    for (int64_t x = 0; x < n; x += kLanes) {
      const int64_t m = n - x < kLanes ? n - x : kLanes;
      alignas(64) float part[kLanes];
      E::scores(k + (c0 + x) * p.k.row, p.k.row, m, qt, p.D, vectors, wide, fresh + x * kLanes,
                x ? part : top);
      if (x)
        for (int j = 0; j < kLanes; j += W) store(top + j, vmax(load(part + j), load(top + j)));
    }
    const bool edge = is_edge(c0, n);
    if (!units.trivial())
      for (int64_t x = 0; x < n * kLanes; x += W)
        store(fresh + x, ScoreUnits::apply(units, load(fresh + x)));
    if (edge || valid < n) mask(fresh, c0, n);
    if (edge || valid < n || !units.trivial()) gather_top(fresh, n);
  }

  // Whether some lane does not see all of the keys: the lowest key of the last row and the highest
  // of the first decide.
  bool is_edge(int64_t c0, int64_t n) const {
    return rows < kLanes || (p.causal && c0 + n - 1 > pos0) ||
           (p.window && c0 <= pos0 + rows - 1 - p.window);
  }

  void mask(float* fresh, int64_t c0, int64_t n) {
    // Each lane sees the keys lo <= x < hi of the step.
    alignas(64) int32_t lo[kLanes], hi[kLanes];
    for (int64_t r = 0; r < kLanes; ++r) {
      const int64_t pos = pos0 + r - c0, from = p.window ? pos - p.window + 1 : 0,
                    to = p.causal ? pos + 1 : n;
      lo[r] = int32_t(from < 0 ? 0 : from > n ? n : from);
      hi[r] = int32_t(r >= rows || to < 0 ? 0 : to > n ? n : to);
    }
    for (int64_t x = 0; x < n; ++x) {
      float* row = fresh + x * kLanes;
      const bool hole = rq.valid && !rq.valid[c0 + x];
      const vi here = int32_t(x) - vi{};
      for (int r = 0; r < kLanes; r += W) {
        const vi sees = (here >= *(const vi_any*)(lo + r)) & (here < *(const vi_any*)(hi + r));
        store(row + r, hole ? splat(-kInf) : sees ? load(row + r) : splat(-kInf));
      }
    }
  }

  void gather_top(const float* block, int64_t n) {
    vf t[kVectors];
    for (int r = 0; r < kVectors; ++r) t[r] = load(block + r * W);
    for (int64_t x = 1; x < n; ++x)
      for (int r = 0; r < kVectors; ++r) t[r] = vmax(t[r], load(block + x * kLanes + r * W));
    for (int r = 0; r < kVectors; ++r) store(top + r * W, t[r]);
  }

  void mark(int64_t j) {
    uint8_t* bits = p.skips + ((b * p.Hq + h) * p.NQ + i) * p.skip_bytes;
    bits[j / 8] |= uint8_t(1 << (j % 8));
  }

  // Moves the kept rows down behind those already held; keys that are not valid are left out.
  void hold(const float* block, int64_t a, int64_t n) {
    for (int64_t x = 0; x < n; ++x) {
      if (rq.valid && !rq.valid[a + x]) continue;
      float* to = s + held * kLanes;
      const float* from = block + x * kLanes;
      if (to != from)
        for (int r = 0; r < kLanes; r += W) store(to + r, load(from + r));
      keys[held++] = a + x;
    }
  }

  void flush() {
    rescale();
    alignas(64) float minus_top[kLanes];
    bool huge = false;
    for (int r = 0; r < kLanes; ++r) {
      minus_top[r] = at[r] == -kInf ? 0.0f : -at[r] * units.unit;
      huge = huge || minus_top[r] > 1048576.0f || minus_top[r] < -1048576.0f;
    }
    if (huge) {  // where the rounding of the product could push an exponent over the top
      for (int64_t x = 0; x < held * kLanes; ++x)
        s[x] -= at[x % kLanes] == -kInf ? 0.0f : at[x % kLanes];
      for (int r = 0; r < kLanes; ++r) minus_top[r] = 0.0f;
    }
    for (int64_t x = 0; x < held; x += kLanes) {
      const int64_t n = held - x < kLanes ? held - x : kLanes;
      E::values(s + x * kLanes, n, keys + x, v, p.v.row, p.Dv, units.unit, minus_top, vectors, l,
                packed, wide, ot);
    }
    held = 0;
  }

  // Weights are relative to `at`, which follows the running max only once that is 2^8 ahead: most
  // maxima rise by little, and rescaling the output for each would cost more than the few bits of
  // range.
  void rescale() {
    alignas(64) float factor[kLanes];
    bool any = false, empty = true;
    for (int r = 0; r < kLanes; ++r) {
      const bool far = (vote.m[r] - at[r]) * units.unit > 8.0f;
      factor[r] = far ? __builtin_exp2f((at[r] - vote.m[r]) * units.unit) : 1.0f;
      empty = empty && (!far || at[r] == -kInf);
      if (far) at[r] = vote.m[r], any = true;
    }
    if (!any) return;
    for (int r = 0; r < kLanes; ++r) l[r] *= factor[r];
    if (empty) return;  // nothing has been added in the lanes that moved
    for (int g = 0; g < kGroups; ++g)
      for (int64_t d = 0; d < p.Dv; ++d)
        for (int j = 0; j < NR; ++j) {
          float* o = ot + (g * p.Dv + d) * kGroupLanes + j * W;
          store(o, load(o) * load(factor + g * kGroupLanes + j * W));
        }
  }

  void finish() {
    const float* sink = p.sinks ? p.sinks + h : nullptr;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t pos = pos0 + r,
                    from = p.window && pos - p.window + 1 > 0 ? pos - p.window + 1 : 0;
      const bool sees = rq.count(from, p.causal && pos + 1 < rq.keys() ? pos + 1 : rq.keys()) > 0;
      const float log_c = vote.track && vote.c[r] > 0
                              ? __builtin_log2f(vote.c[r]) + vote.at[r] * units.unit
                              : -kInf;
      const RowEnd end = end_row(at[r] * units.unit, l[r], log_c, sees, sink);
      p.lse[(b * p.Hq + h) * p.Lq + row0 + r] = end.lse;
      if (p.dropped) p.dropped[(b * p.Hq + h) * p.Lq + row0 + r] = end.dropped;
      const float* o = ot + (r / kGroupLanes) * p.Dv * kGroupLanes + r % kGroupLanes;
      for (int64_t d = 0; d < p.Dv; ++d) wide[d] = sees ? o[d * kGroupLanes] * end.factor : 0.0f;
      narrow(wide, p.Dv, static_cast<T*>(p.out) + ((b * p.Lq + row0 + r) * p.Hq + h) * p.Dv);
    }
    if (!counted) return;
    __atomic_fetch_add(p.counts + (b * p.Hq + h) * 2, visited, __ATOMIC_RELAXED);
    __atomic_fetch_add(p.counts + (b * p.Hq + h) * 2 + 1, skipped, __ATOMIC_RELAXED);
  }
};

template <class E>
void prefill(const Problem& p, int64_t b, int64_t h, int64_t i, char* scratch) {
  Prefill<E>(p, b, h, i).run(scratch);
}

}  // namespace bsa::BSA_LEVEL
