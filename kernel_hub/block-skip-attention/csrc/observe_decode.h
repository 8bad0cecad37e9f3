// The last query of a block row as a decode step: the heads of one group vote together, on the
// scores that prefill has computed anyway. It costs a 64th of prefill or so.
#pragma once
#include "observe_tally.h"

namespace bsa::BSA_LEVEL {

// What the heads of a group left: the scores of their last query, and log2 of its whole softmax.
struct LastQueries {
  int64_t heads, lo, hi, stride;  // keys [lo, hi) are visible
  const float* scores;            // [heads][stride], by key
  const float* log_mass;          // [heads]
};

struct DecodeMemory {
  float *top, *mass;    // [heads][stride]: of a block, the largest score and all its weight
  float *share, *most;  // [stride]: its share, a mean over heads; its max over heads
  float *seed_top, *seed_mass, *m, *shift;  // [heads]
  float* slack;                             // [heads][kMaxEps]
  static int64_t floats(int64_t heads, int64_t stride) {
    return (2 * heads + 2) * stride + heads * (4 + kMaxEps);
  }
  DecodeMemory(float* at, int64_t heads, int64_t stride) {
    const auto take = [&](int64_t n) { return at += n, at - n; };
    slack = take(heads * kMaxEps);
    top = take(heads * stride), mass = take(heads * stride), share = take(stride),
    most = take(stride);
    seed_top = take(heads), seed_mass = take(heads), m = take(heads), shift = take(heads);
  }
};

class DecodeObserver {
 public:
  DecodeObserver(const Observe& o, const Observed& g, const LastQueries& q, DecodeMemory memory,
                 float unit, Bins bins, bool budget, Tally* tally)
      : o_(o),
        g_(g),
        q_(q),
        at_(memory),
        unit_(unit),
        bins_(bins),
        budget_(budget),
        tally_(tally) {}

  // Returns the largest score of each block, by its number.
  float* run() {
    tally_->clear(o_);
    const int64_t block_k = g_.block_k;
    first_ = q_.lo / block_k, last_ = (q_.hi - 1) / block_k + 1;
    refer();
    if (block_k == 1)
      keys();
    else
      blocks();
    for (int64_t h = 0; h < q_.heads; ++h) at_.seed_top[h] = -kInf, at_.seed_mass[h] = 0;
    if (first_ == 0) seed(0);
    if (last_ - 1 > 0) seed(last_ - 1);
    const int64_t from = first_ > 1 ? first_ : 1, to = last_ - 1;
    int64_t splits = 0;
    for (int64_t j = from; j < to; j = end_of_split(j, block_k, g_.split_k)) ++splits;
    for (int64_t j = from, end; j < to; j = end) {
      end = end_of_split(j, block_k, g_.split_k);
      walk(j, end < to ? end : to, 1.0f / float(splits));
    }
    return at_.most;
  }

 private:
  // Weights are relative to the seed, unless it is so light that the heaviest would overflow.
  void refer() {
    for (int64_t h = 0; h < q_.heads; ++h) {
      const float* s = q_.scores + h * q_.stride;
      float m = -kInf, seed = -kInf;
      for (int64_t c = q_.lo; c < q_.hi; ++c) {
        m = s[c] > m ? s[c] : m;
        const int64_t j = c / g_.block_k;
        if ((j == 0 || j == last_ - 1) && s[c] > seed) seed = s[c];
      }
      const float lowest = m - 86.0f / unit_, ref = seed > lowest ? seed : lowest;
      at_.shift[h] = m == -kInf ? 0.0f : -ref * unit_;
    }
  }

  void keys() {
    const float per_head = 1.0f / float(q_.heads);
    for (int64_t c = q_.lo; c < q_.hi; c += W) {  // rows are padded to whole vectors
      vf share = {}, most = splat(-kInf);
      for (int64_t h = 0; h < q_.heads; ++h) {
        const vf s = load(q_.scores + h * q_.stride + c);
        store(at_.top + h * q_.stride + c, s);
        store(at_.mass + h * q_.stride + c, exp2v(s * unit_ + at_.shift[h]));
        share += exp2v(s * unit_ - q_.log_mass[h]);
        most = vmax(s, most);
      }
      store(at_.share + c, share * per_head), store(at_.most + c, most);
    }
  }

  void blocks() {
    for (int64_t j = first_; j < last_; ++j) {
      const int64_t a = j * g_.block_k > q_.lo ? j * g_.block_k : q_.lo;
      const int64_t e = (j + 1) * g_.block_k < q_.hi ? (j + 1) * g_.block_k : q_.hi;
      float share = 0, most = -kInf;
      for (int64_t h = 0; h < q_.heads; ++h) {
        const float* s = q_.scores + h * q_.stride;
        vf top = splat(-kInf), mass = {}, part = {};
        for (int64_t c = a; c < e; c += W) {
          vf x = load(s + c);
          if (e - c < W) x = first_lanes(x, e - c);
          top = vmax(x, top);
          mass += exp2v(x * unit_ + at_.shift[h]);
          part += exp2v(x * unit_ - q_.log_mass[h]);
        }
        const float m = max_of(top);
        at_.top[h * q_.stride + j] = m, at_.mass[h * q_.stride + j] = sum_of(mass);
        share += sum_of(part);
        most = m > most ? m : most;
      }
      at_.share[j] = share / float(q_.heads), at_.most[j] = most;
    }
  }

  BSA_INLINE vf first_lanes(vf x, int64_t n) {
    vi lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    return lane < int32_t(n) ? x : splat(-kInf);
  }

  // Kept whatever it holds.
  void seed(int64_t j) {
    for (int64_t h = 0; h < q_.heads; ++h) {
      const float top = at_.top[h * q_.stride + j];
      if (top > at_.seed_top[h]) at_.seed_top[h] = top;
      at_.seed_mass[h] += at_.mass[h * q_.stride + j];
    }
    tally_->add(bins_.last, at_.share[j]);
    ++tally_->visited;
  }

  // The split of blocks [from, to), which starts from the seed and may spend a share of its mass.
  void walk(int64_t from, int64_t to, float spendable) {
    for (int64_t h = 0; h < q_.heads; ++h) {
      at_.m[h] = at_.seed_top[h];
      for (int64_t e = 0; e < kMaxEps; ++e)
        at_.slack[h * kMaxEps + e] = o_.eps[e] * at_.seed_mass[h] * spendable;
    }
    for (int64_t j = from; j < to; j += W) {
      const int64_t n = to - j < W ? to - j : W;
      const vi bin = bins_.of(gaps(j, n));
      for (int64_t y = 0; y < n; ++y) tally_->add(bin[y], at_.share[j + y]);
    }
    if (budget_) spend(from, to);
    tally_->visited += to - from;
  }

  // Of n <= W blocks from j on.
  vf gaps(int64_t j, int64_t n) {
    vf gap = splat(-kInf);
    for (int64_t h = 0; h < q_.heads; ++h) {
      const vf top = first_lanes(load(at_.top + h * q_.stride + j), n);
      float& m = at_.m[h];
      if (!any_set(top > m)) {
        gap = vmax(top - m, gap);
        continue;
      }
      for (int64_t y = 0; y < n; ++y) {
        const float x = top[y], mine = x - m;
        if (mine > gap[y]) gap[y] = mine;
        if (x > m) m = x;
      }
    }
    return gap;
  }

  // The eps are side by side in lanes.
  void spend(int64_t from, int64_t to) {
    constexpr int kSide = kMaxEps / W;
    const float most_of = float(g_.block_k);
    vi skipped[kSide] = {};
    for (int64_t j = from; j < to; ++j) {
      vi keep[kSide] = {};
      for (int64_t h = 0; h < q_.heads; ++h) {
        const float bound = bound_of(h, j, most_of);
        for (int e = 0; e < kSide; ++e)
          keep[e] |= splat(bound) > load(at_.slack + h * kMaxEps + e * W);
      }
      for (int64_t h = 0; h < q_.heads; ++h) {
        const float bound = bound_of(h, j, most_of), mass = at_.mass[h * q_.stride + j];
        for (int e = 0; e < kSide; ++e) {
          float* const slack = at_.slack + h * kMaxEps + e * W;
          store(slack, load(slack) + (keep[e] ? load(o_.eps + e * W) * mass : splat(-bound)));
        }
      }
      for (int e = 0; e < kSide; ++e) skipped[e] += 1 + keep[e];  // a true compare is -1
    }
    for (int64_t e = 0; e < o_.eps_count; ++e) tally_->skipped[e] += skipped[e / W][e % W];
  }

  float bound_of(int64_t h, int64_t j, float block_k) const {
    if (block_k == 1.0f) return at_.mass[h * q_.stride + j];
    return block_k * exp2s(at_.top[h * q_.stride + j] * unit_ + at_.shift[h]);
  }

  const Observe& o_;
  const Observed& g_;
  const LastQueries& q_;
  const DecodeMemory at_;
  const float unit_;
  const Bins bins_;
  const bool budget_;
  Tally* const tally_;
  int64_t first_ = 0, last_ = 0;
};

}  // namespace bsa::BSA_LEVEL
