// Blocks of 64 keys or more, from what the pass left of each 64 keys: every lane's largest score,
// and the sum of its weights relative to that. A block row is short in those units, so what must
// wait for the end of the row is done then.
#pragma once
#include "observe_tally.h"

namespace bsa::BSA_LEVEL {

struct Chunks {
  float *top, *sum;       // [chunks][64]
  int64_t first, last;    // chunks [first, last)
  const float* log_mass;  // [64]: log2 of the lane's whole softmax
  int64_t rows;
};

// The votes on the blocks of one geometry, in order of their visits.
class BlockObserver {
 public:
  BlockObserver(const Observe& o, const Observed& g, const Chunks& chunks, float unit, Bins bins,
                Tally* tally)
      : o_(o),
        g_(g),
        chunks_(chunks),
        unit_(unit),
        bins_(bins),
        tally_(tally),
        width_(g.block_k / kLanes) {}

  // `tops` [blocks]: the largest score of each block, by its number.
  void run(float* tops) {
    tally_->clear(o_);
    const int64_t first = chunks_.first / width_, last = (chunks_.last - 1) / width_ + 1;
    start(first == 0 ? 0 : last - 1);
    if (first == 0) visit(0, tops);
    if (last - 1 > 0) visit(last - 1, tops);
    for (int64_t j = first > 1 ? first : 1; j < last - 1; ++j) visit(j, tops);
  }

 private:
  // Weights are relative to the first block that is visited, unless that is so light that the
  // heaviest would overflow.
  void start(int64_t j) {
    for (int i = 0; i < kLanes; i += W) {
      vf m = splat(-kInf);
      for (int64_t c = chunks_.first; c < chunks_.last; ++c)
        m = vmax(load(chunks_.top + c * kLanes + i), m);
      const vf lowest = m - 86.0f / unit_;
      vf ref = vmax(max_in(j, i), lowest);
      store(shift_ + i, m == -kInf ? vf{} : -ref * unit_);  // a lane without a row
      const vf end = load(chunks_.log_mass + i);
      store(end_ + i, end);
      store(m_ + i, splat(-kInf));
    }
    memset(slack_, 0, sizeof(slack_));
  }

  int64_t begin(int64_t j) const { return j * width_ > chunks_.first ? j * width_ : chunks_.first; }
  int64_t end(int64_t j) const {
    return (j + 1) * width_ < chunks_.last ? (j + 1) * width_ : chunks_.last;
  }

  vf max_in(int64_t j, int i) const {
    vf top = splat(-kInf);
    for (int64_t c = begin(j); c < end(j); ++c) top = vmax(load(chunks_.top + c * kLanes + i), top);
    return top;
  }

  void visit(int64_t j, float* tops) {
    vf gap = splat(-kInf), most = splat(-kInf), share = {};
    alignas(64) float bound[kLanes], mass[kLanes];
    for (int i = 0; i < kLanes; i += W) {
      const vf top = max_in(j, i), m = load(m_ + i);
      gap = vmax(top - m, gap);
      most = vmax(top, most);
      store(m_ + i, vmax(top, m));
      vf sum = {};
      for (int64_t c = begin(j); c < end(j); ++c) {
        const vf x = load(chunks_.top + c * kLanes + i) * unit_,
                 s = load(chunks_.sum + c * kLanes + i);
        share += s * exp2v(x - load(end_ + i));
        sum += s * exp2v(x + load(shift_ + i));
      }
      store(mass + i, sum);
      store(bound + i, float(g_.block_k) * exp2v(top * unit_ + load(shift_ + i)));
    }
    tops[j] = max_of(most);
    tally_->add(bins_.of(max_of(gap)), sum_of(share) / float(chunks_.rows));
    ++tally_->visited;
    for (int64_t e = 0; e < o_.eps_count; ++e) {
      float* const slack = slack_ + e * kLanes;
      const bool keep = any_above64(bound, slack);
      for (int i = 0; i < kLanes; i += W)
        store(slack + i, keep ? load(slack + i) + o_.eps[e] * load(mass + i)
                              : load(slack + i) - load(bound + i));
      tally_->skipped[e] += !keep;
    }
  }

  const Observe& o_;
  const Observed& g_;
  const Chunks& chunks_;
  const float unit_;
  const Bins bins_;
  Tally* const tally_;
  const int64_t width_;  // chunks in a block
  alignas(64) float m_[kLanes], shift_[kLanes], end_[kLanes], slack_[kMaxEps * kLanes];
};

}  // namespace bsa::BSA_LEVEL
