// The tasks of observing, and what of it no vector unit can speed up.
#include "observe.h"

#include <algorithm>
#include <functional>

#include "parallel.h"

namespace bsa {

void run_observe(const Problem& p, const Observe& o, const Level& level) {
  const int type = int(p.dtype);
  run_tasks(p.Hkv * p.NQ, level.observe_bytes(p, o), [&](int64_t task, char* scratch) {
    level.observe[type](p, o, task / p.NQ, p.NQ - 1 - task % p.NQ, scratch);
  });
}

void store_midpoints(const Observe& o, const Observed& g, float* largest, int64_t n, float scale,
                     float* to, int64_t stride) {
  float* end = largest + n;
  for (int64_t level = o.levels; level-- > 0;) {
    const int64_t k = g.kept[level];
    float& midpoint = to[level * stride];
    midpoint = -__builtin_inff();
    if (n <= k) continue;
    // Everything behind the k + 1 largest is of no interest to the smaller levels.
    std::nth_element(largest, largest + k, end, std::greater<float>());
    end = largest + k + 1;
    const float least_kept = *std::min_element(largest, largest + k);
    midpoint = 0.5f * (least_kept + largest[k]) * scale;
  }
}

}  // namespace bsa
