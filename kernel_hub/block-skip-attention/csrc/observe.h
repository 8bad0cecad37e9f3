// One dense pass that tells what every threshold would do: what is wanted of it, and where it goes.
//
// The definition, in plain torch: hf_sparse_attention/calibration/observation_reference.py. An
// unpadded causal prefill of one request, block rows of 64 queries, blocks visited sink and
// diagonal first.
#pragma once
#include "problem.h"

namespace bsa {

constexpr int kMaxObserved = 8;  // geometries
constexpr int kMaxEps = 16;      // and values of the budget that are simulated
constexpr int kMaxBins = 1024;

struct Observed {
  int64_t block_k, split_k;
  int64_t* prefill;     // [Hq, width]: counts by bin, mass by bin, visited, skipped by eps
  int64_t* decode;      // [groups, Hkv, width]
  float* prefill_tops;  // [levels, Hq, positions], natural units
  float* decode_tops;   // [levels, Hkv, positions]
  const int64_t* kept;  // [levels], ascending: how many competing blocks a level keeps
};

struct Observe {
  Observed geometry[kMaxObserved];
  int geometries = 0;
  int64_t levels = 0, positions = 0, eps_count = 0;
  float eps[kMaxEps] = {};
  bool keep_sink = true;
  const int64_t* groups = nullptr;  // [NQ]: which group of lengths a block row's decode counts in
  // Bins of gap + ln L, the last for gaps that are not below 0; shares in units of `mass_unit`.
  int64_t bins = 0, width = 0;
  float u_min = 0, bins_per_nat = 0;
  double mass_unit = 1;
  // Single keys: the budget is simulated in all block rows up to query `sample_from`, then in every
  // `sample_every`-th, which counts that often.
  int64_t sample_from = 0, sample_every = 1;

  BSA_PLAIN int64_t weight(int64_t block_k, int64_t i) const {
    if (block_k > 1 || i * kLanes < sample_from) return 1;
    return i % sample_every == sample_every - 1 ? sample_every : 0;
  }
};

void run_observe(const Problem& p, const Observe& o, const Level& level);

// Stores the midpoints that keep just each level's blocks, -inf where no more than those compete;
// `largest` are the n maxima of the competing blocks, in any order, and are moved around; `scale`
// makes them natural.
void store_midpoints(const Observe& o, const Observed& g, float* largest, int64_t n, float scale,
                     float* to, int64_t stride);

}  // namespace bsa
