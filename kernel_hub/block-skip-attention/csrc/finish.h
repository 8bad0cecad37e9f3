// The end of a row, the same for prefill and decode: from sums in base 2 to lse, normalisation and
// certificate.
#pragma once
#include "vote.h"

namespace bsa::BSA_LEVEL {

struct RowEnd {
  float factor;   // what the row's weighted sum of values is multiplied by
  float lse;      // natural logarithm
  float dropped;  // c / (l + c)
};

// `top` and `log_c` are base-2 logarithms; l is the sum of the kept weights relative to 2^top;
// `sees` is whether any key is visible to the row; `sink` a natural logit, or null.
BSA_INLINE RowEnd end_row(float top, float l, float log_c, bool sees, const float* sink) {
  if (!sees) return {0.0f, -kInf, 0.0f};
  float total = l, unit = 1.0f, base = top;
  if (sink && *sink > -kInf) {
    const float s = *sink * kLog2e;
    base = top > s ? top : s;
    unit = __builtin_exp2f(top - base);  // 0 for a row that kept nothing
    total = l * unit + __builtin_exp2f(s - base);
  }
  if (total == 0.0f) return {0.0f, -kInf, log_c > -kInf ? 1.0f : 0.0f};
  const float log_l = base + __builtin_log2f(total);
  const float dropped = log_c > -kInf ? 1.0f / (1.0f + __builtin_exp2f(log_l - log_c)) : 0.0f;
  return {unit / total, log_l * kLn2, dropped};
}

}  // namespace bsa::BSA_LEVEL
