// The two query rows of a thread: when they agree to skip a block, and their running softmax.
//
// Four threads (a quad) share a row, each with its own columns: maxima are exchanged among them at
// once, sums at the end. Scores stay in the units in which the product made them; `unit` > 0 turns
// them into base-2 logarithms, and thresholds are turned into those units once. So the exponential
// of a score is one multiply-add and one instruction, and a vote one comparison a row.
#pragma once
#include "instructions.h"
#include "walk.h"

namespace bsa::cuda::sm90 {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kLargestLogLambda = -5.9604645e-08f;  // log(1 - 2^-24): lambda stays below 1
constexpr float kLargest = 3.4028234663852886e38f;

// From products to scores: a score is `product * before`, or the tanh of that if `capped`.
struct Units {
  float before = 1.0f, unit;
  bool capped;
  __device__ __forceinline__ explicit Units(const Params& p) : capped(p.softcap > 0.0f) {
    if (capped)
      before = p.scale / p.softcap, unit = p.softcap * kLog2e;
    else if (p.scale > 0.0f)
      unit = p.scale * kLog2e;
    else  // a unit must be positive, so such a scale is applied to the products
      before = p.scale, unit = kLog2e;
  }
  // tanh(x) = 1 - 2 / (exp(2 x) + 1), which neither overflows nor loses the sign.
  __device__ __forceinline__ float score(float product) const {
    const float x = product * before;
    return capped ? 1.0f - 2.0f / (exp2_approx(x * (2.0f * kLog2e)) + 1.0f) : x;
  }
};

__device__ __forceinline__ float quad_max(float x) {
  x = larger(x, __shfl_xor_sync(0xffffffff, x, 1));
  return larger(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// kTracked: with the bound c on what was dropped, for the budget and the certificate.
template <bool kTracked>
struct RowPair {
  float m[2], l[2];    // running max of what was kept; this thread's part of its sum, relative to m
  float top[2], c[2];  // max of all that was seen; bound on what was dropped, relative to top
  float bound[2];      // a row agrees to skip what stays below
  bool silent[2];      // has no vote
  float unit, relative, absolute, budget;

  __device__ __forceinline__ RowPair(const Params& p, const BlockRow& row, float unit_, int b,
                                     int h, int r) {
    unit = unit_;
    relative = absolute = kInfinity;
    budget = -1.0f;  // no budget, or one too small for the arithmetic: nothing passes
    if (p.log_lambda.data) {
      const float x = p.log_lambda.at(b, h, 0);
      relative = x == x ? fminf(x, kLargestLogLambda) * kLog2e / unit : -kInfinity;
    }
    if (p.threshold.data) {  // which has no number for the row beside the last, if that is missing
      const float x = p.threshold.at(b, h, row.rows ? row.number : 0) * kLog2e / unit;
      absolute = x == x ? x : -kInfinity;
    }
    if (p.budget.data) {
      const float x = p.budget.at(b, h, 0);
      if (x > 1e-30f) budget = x;
    } else if (!p.log_lambda.data && !p.threshold.data) {
      absolute = -kInfinity;  // no rule: nothing is skipped
    }
    for (int e = 0; e < 2; ++e) {
      m[e] = top[e] = -kInfinity;
      l[e] = c[e] = 0.0f;
      silent[e] = r + 8 * e >= row.voters;
      limit(e);
    }
  }

  // Never below the lowest float: a row that sees nothing of a block, with max -inf, always agrees.
  // A NaN is below nothing, and neither is anything below a NaN.
  __device__ __forceinline__ void limit(int e) {
    const float x = relative < kInfinity ? m[e] + relative : kInfinity;
    bound[e] = larger(smaller(x, absolute), -kLargest);
  }

  // Whether both rows agree to skip a block of maxima `fresh`.
  __device__ __forceinline__ bool agree(const Params& p, const float (&fresh)[2],
                                        float block_k) const {
    bool all = true;
    for (int e = 0; e < 2; ++e) {
      bool agrees = fresh[e] < bound[e];
      if constexpr (kTracked) {
        // c relative to m; with nothing kept yet it is infinite.
        const float mass =
            then(e, fresh[e], block_k) * exp2_approx((larger(top[e], fresh[e]) - m[e]) * unit);
        // The quad's four votes must be one row's: all of them need its whole sum.
        const float sum = p.budget.data ? quad_sum(l[e]) : 0.0f;
        if (p.budget.data) agrees &= mass <= budget * sum || fresh[e] == -kInfinity;
      }
      all &= agrees || silent[e];
    }
    return all;
  }

  // c with a block of maxima `fresh` dropped too, relative to the new top.
  __device__ __forceinline__ float then(int e, float fresh, float block_k) const {
    const float next = larger(top[e], fresh);
    const float at = next == -kInfinity ? 0.0f : next;
    const float before = c[e] > 0.0f ? c[e] * exp2_approx((top[e] - at) * unit) : 0.0f;
    return before + block_k * exp2_approx((fresh - at) * unit);
  }

  // Enters a block's maxima.
  __device__ __forceinline__ void saw(const float (&fresh)[2], bool skipped, float block_k) {
    for (int e = 0; e < 2; ++e) {
      const float next = larger(top[e], fresh[e]);
      if constexpr (kTracked) {
        const float kept = c[e] > 0.0f ? c[e] * exp2_approx((top[e] - next) * unit) : 0.0f;
        c[e] = skipped ? then(e, fresh[e], block_k) : kept;
      }
      top[e] = next;
    }
  }

  // A kept block: its scores become weights, and `shrink` what the output so far is multiplied by.
  template <int kCount>
  __device__ __forceinline__ void weigh(float (&s)[kCount], const float (&fresh)[2],
                                        float (&shrink)[2]) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float next = larger(m[e], fresh[e]);
      const float base = next == -kInfinity ? 0.0f : next, at = base * unit;
      // Exactly 1 if the max is the same: an error here would be made again with every block.
      shrink[e] = exp2_approx((m[e] - base) * unit);
      m[e] = next;
      limit(e);
      float sum[2] = {0.0f, 0.0f};
#pragma unroll
      for (int i = 2 * e; i < kCount; i += 4)
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          s[i + x] = exp2_approx(fmaf(s[i + x], unit, -at));
          sum[x] += s[i + x];
        }
      l[e] = l[e] * shrink[e] + (sum[0] + sum[1]);
    }
  }

  struct End {
    float factor;   // what the row's weighted sum of values is multiplied by
    float lse;      // natural logarithm
    float dropped;  // c / (l + c)
  };

  // `sink` is the natural logit of an attention sink, or null.
  __device__ __forceinline__ End end(int e, const float* sink) const {
    const float sum = quad_sum(l[e]);  // of all four threads, whatever comes now
    if (top[e] == -kInfinity) return {0.0f, -kInfinity, 0.0f};
    float base = m[e] * unit, factor = 1.0f, total = sum;
    if (sink && *sink > -kInfinity) {  // it may outweigh everything by far: then it is the unit
      const float s = *sink * kLog2e;
      base = larger(m[e] * unit, s);
      factor = exp2f(m[e] * unit - base);
      total = sum * factor + exp2f(s - base);
    }
    const float log_c = c[e] > 0.0f ? log2f(c[e]) + top[e] * unit : -kInfinity;
    if (total == 0.0f) return {0.0f, -kInfinity, c[e] > 0.0f ? 1.0f : 0.0f};
    const float log_l = base + log2f(total);
    const float dropped = c[e] > 0.0f ? 1.0f / (1.0f + exp2f(log_l - log_c)) : 0.0f;
    return {factor / total, log_l * kLn2, dropped};
  }
};

}  // namespace bsa::cuda::sm90
