// When a row agrees to skip a block, and what it has kept and dropped so far: shared by all
// kernels. The same formulas as in rules.py of the Triton kernels.
#pragma once
#include "params.h"
#include "ptx_sm80.cuh"

namespace bsa::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLargestLogLambda = -5.9604646553596641e-8f;  // ln(1 - 2^-24)
constexpr float kMinusInfinity = -__builtin_huge_valf();

// What the rules say for one row; of a condition that is not given, anything.
struct RowRule {
  float log_lambda = 0, threshold = 0, budget = 0;
};

__device__ __forceinline__ RowRule rule_of(const Params& p, int64_t b, int64_t head, int64_t row) {
  RowRule rule;
  if (p.log_lambda.data) rule.log_lambda = fminf(p.log_lambda.at(b, head, 0), kLargestLogLambda);
  if (p.threshold.data) rule.threshold = p.threshold.at(b, head, row);
  if (p.budget.data) rule.budget = p.budget.at(b, head, 0);
  return rule;
}

// The softmax of one row so far, and the certificate of what it dropped.
struct Row {
  float m = kMinusInfinity;    // max of what was kept
  float l = 0;                 // its sum, in units of exp(m); maybe one lane's share only
  float top = kMinusInfinity;  // max of all that was seen
  float c = 0;                 // bound on what was dropped, in units of exp(top)

  // c and its unit if a block of `keys` keys and maximum m_new is dropped as well.
  __device__ __forceinline__ float dropped_then(float m_new, int keys) const {
    const float top_then = fmaxf(top, m_new);
    const float unit = top_then == kMinusInfinity ? 0.0f : top_then;
    const float before = c > 0 ? c * exp2_fast((top - unit) * kLog2E) : 0.0f;
    return before + float(keys) * exp2_fast((m_new - unit) * kLog2E);
  }

  // Whether the row agrees to every condition that is given. One that sees nothing of the block
  // does not mind. `sum` is the whole row's l.
  __device__ __forceinline__ bool agrees(const Params& p, const RowRule& rule, float m_new,
                                         float sum, int keys) const {
    bool yes = true;
    // With lambda < 1 a skipped block cannot raise the running max.
    if (p.log_lambda.data) yes = m_new - m < rule.log_lambda;
    if (p.threshold.data) yes = yes && m_new < rule.threshold;
    if (p.budget.data) {
      // With m = -inf nothing is kept yet, and nothing may be dropped.
      const float unit = exp2_fast((fmaxf(top, m_new) - m) * kLog2E);
      yes = yes && dropped_then(m_new, keys) * unit <= rule.budget * sum;
    }
    return yes || m_new == kMinusInfinity;
  }

  // Takes note of a block that was visited.
  __device__ __forceinline__ void saw(const Params& p, float m_new, int keys, bool skipped) {
    if (p.wants_dropped()) {
      if (skipped)
        c = dropped_then(m_new, keys);
      else if (c > 0)
        c *= exp2_fast((top - fmaxf(top, m_new)) * kLog2E);
    }
    top = max_or_nan(top, m_new);
  }

  // Raises m to that of a kept block; returns what everything summed up so far shrinks by.
  __device__ __forceinline__ float raise(float m_new) {
    const float m_then = fmaxf(m, m_new);
    const float shrinks = m_then == kMinusInfinity ? 0.0f : exp2_fast((m - m_then) * kLog2E);
    m = m_then, l *= shrinks;
    return shrinks;
  }

  // What the exponents are counted from.
  __device__ __forceinline__ float shift() const { return m == kMinusInfinity ? 0.0f : m; }
};

// The end of a row: its lse, what its sum of values is to be multiplied with, and the share
// dropped.
struct RowEnd {
  float lse, factor, dropped;
  bool sees;  // else its values are zeros, whatever was summed up
};

// Without sinks, `sink` is -inf.
__device__ __forceinline__ RowEnd end_of_row(const Row& row, float sink) {
  // The sink may outweigh everything by far: its logit then is the unit.
  const float unit = fmaxf(row.m, sink);
  const float shift = unit == kMinusInfinity ? 0.0f : unit;
  const float weight = exp2_fast((row.m - shift) * kLog2E);
  const float sum = row.l * weight + exp2_fast((sink - shift) * kLog2E);
  const bool empty = sum == 0;
  RowEnd end;
  end.sees = !(row.top == kMinusInfinity);  // NaN is seen
  end.lse = !end.sees || empty ? kMinusInfinity : shift + log2f(sum) * kLn2;
  end.factor = empty ? 0.0f : weight / sum;
  // c / (l + c) = 1 / (1 + exp(lse) / c), in units that cannot overflow.
  const float log_c = row.top + log2f(row.c > 0 ? row.c : 1.0f) * kLn2;
  end.dropped = row.c > 0 ? 1.0f / (1.0f + exp2_fast((end.lse - log_c) * kLog2E)) : 0.0f;
  return end;
}

}  // namespace bsa::cuda
