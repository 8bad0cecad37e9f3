// Single keys as blocks: gaps, shares and the budget, of the 64 queries of a block row.
//
// A gap needs the running max before its key, so keys are walked in the order of their visits; the
// maxima over lanes are taken for many keys at once. What a key's share of the final softmax is,
// only the end of the row tells. So weights are not summed key by key but bin by bin, lane by lane:
// when the row is done, a bin's sum is one product with what the lanes' weights have become worth.
#pragma once
#include "observe_tally.h"

namespace bsa::BSA_LEVEL {

class KeyObserver {
 public:
  Tally* tally;
  float* bin_mass;  // [bins][64]: sums of weights, set where tally->count is not 0

  void start(const Observe& o, const Bins* bins, int64_t weight) {
    o_ = &o, bins_ = bins, weight_ = weight;
    tally->clear(o);
    memset(slack_, 0, sizeof(slack_));
  }

  // Keys [lo, hi) of the step with scores s, visited now; `m` are the running maxima. Leaves the
  // largest score of each key in `tops`.
  void visit(const float* s, int64_t lo, int64_t hi, float* m, float* tops) {
    alignas(64) float gaps[W * W], maxima[W * W];
    vf top[kVectors];
    for (int j = 0; j < kVectors; ++j) top[j] = load(m + j * W);
    for (int64_t x = lo; x < hi; x += W) {
      const int64_t n = hi - x < W ? hi - x : W;
      for (int64_t y = 0; y < n; ++y) {
        const float* row = s + (x + y) * kLanes;
        vf gap = splat(-kInf), most = splat(-kInf);
        for (int j = 0; j < kVectors; ++j) {
          const vf score = load(row + j * W);
          gap = vmax(score - top[j], gap);  // -inf - -inf, and any NaN, is passed over
          most = vmax(score, most);
          top[j] = vmax(score, top[j]);
        }
        store(gaps + y * W, gap), store(maxima + y * W, most);
      }
      const vi bin = bins_->of(max_of_rows(gaps));
      const vf most = max_of_rows(maxima);
      for (int64_t y = 0; y < n; ++y) bin_[x + y] = bin[y], tops[x + y] = most[y];
    }
    for (int j = 0; j < kVectors; ++j) store(m + j * W, top[j]);
  }

  // The weights of lane i are relative to something else from now on.
  void rescale(const float* factor) {
    for (int64_t bin = 0; bin < o_->bins; ++bin)
      if (tally->count[bin]) times(bin_mass + bin * kLanes, factor);
    for (int64_t e = 0; e < o_->eps_count; ++e) times(slack_ + e * kLanes, factor);
  }

  // The weights of the keys [0, n) of the step.
  void weigh(const float* weights, int64_t n) {
    for (int64_t x = 0; x < n; ++x) {
      float* const sum = bin_mass + bin_[x] * kLanes;
      const float* row = weights + x * kLanes;
      if (tally->count[bin_[x]]++ == 0) {
        for (int i = 0; i < kLanes; i += W) store(sum + i, load(row + i));
      } else {
        for (int i = 0; i < kLanes; i += W) store(sum + i, load(sum + i) + load(row + i));
      }
    }
  }

  // The budget's votes on the keys [lo, hi) of the step; `sum` are their weights' sums, or null.
  void spend(const float* weights, int64_t lo, int64_t hi, const float* sum) {
    if (!weight_ || lo >= hi) return;
    tally->visited += hi - lo;
    constexpr int kSide = W == 16 ? 4 : 1;  // eps side by side, to hide each other's latency
    int64_t open[kMaxEps], n = 0;
    for (int64_t e = 0; e < o_->eps_count; ++e) {
      float* const slack = slack_ + e * kLanes;
      if (sum && !any_above64(sum, slack)) {  // all of them are skipped
        tally->skipped[e] += hi - lo;
        for (int i = 0; i < kLanes; i += W) store(slack + i, load(slack + i) - load(sum + i));
      } else {
        open[n++] = e;
      }
    }
    int64_t i = 0;
    for (; i + kSide <= n; i += kSide) spend_on<kSide>(weights, lo, hi, open + i);
    for (; i < n; ++i) spend_on<1>(weights, lo, hi, open + i);
  }

  // `worth`: of a weight in each lane, as a share of the final softmax, over the number of rows.
  void finish(const float* worth, int64_t* to) {
    for (int64_t bin = 0; bin < o_->bins; ++bin) {
      if (!tally->count[bin]) continue;
      vf sum = {};
      for (int i = 0; i < kLanes; i += W)
        sum += load(bin_mass + bin * kLanes + i) * load(worth + i);
      tally->mass[bin] = sum_of(sum);
    }
    tally->flush(*o_, weight_, to);
  }

 private:
  static void times(float* x, const float* factor) {
    for (int i = 0; i < kLanes; i += W) store(x + i, load(x + i) * load(factor + i));
  }

  // slack = eps * kept - dropped, a lane. A key that is heavier in some lane is kept.
  template <int N>
  void spend_on(const float* weights, int64_t lo, int64_t hi, const int64_t* which) {
    vf slack[N][kVectors];
    int64_t kept[N] = {};
    for (int e = 0; e < N; ++e)
      for (int j = 0; j < kVectors; ++j) slack[e][j] = load(slack_ + which[e] * kLanes + j * W);
    for (int64_t x = lo; x < hi; ++x) {
      vf weight[kVectors];
      for (int j = 0; j < kVectors; ++j) weight[j] = load(weights + x * kLanes + j * W);
      for (int e = 0; e < N; ++e) {
        const bool keep = heavier(weight, slack[e]);
        const vf share = splat(keep ? o_->eps[which[e]] : -1.0f);
        for (int j = 0; j < kVectors; ++j) slack[e][j] += weight[j] * share;
        kept[e] += keep;
      }
    }
    for (int e = 0; e < N; ++e) {
      for (int j = 0; j < kVectors; ++j) store(slack_ + which[e] * kLanes + j * W, slack[e][j]);
      tally->skipped[which[e]] += hi - lo - kept[e];
    }
  }

  BSA_INLINE bool heavier(const vf* weight, const vf* slack) {
#if BSA_ISA >= 2
    unsigned any = 0;
    for (int j = 0; j < kVectors; ++j)
      any |= _mm512_cmp_ps_mask((__m512)weight[j], (__m512)slack[j], _CMP_GT_OQ);
    return any != 0;
#else
    vi any = {};
    for (int j = 0; j < kVectors; ++j) any |= weight[j] > slack[j];
    return any_set(any);
#endif
  }

  const Observe* o_ = nullptr;
  const Bins* bins_ = nullptr;
  int64_t weight_ = 0;
  int32_t bin_[2 * kLanes + W];
  alignas(64) float slack_[kMaxEps * kLanes];
};

}  // namespace bsa::BSA_LEVEL
