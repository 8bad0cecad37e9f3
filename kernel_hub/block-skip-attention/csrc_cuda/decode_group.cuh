// Decode for one position and GQA group, whose heads are the rows of one tensor-core product: all
// but how K and V come to shared memory. The kernels of all GPUs share it, so they decide alike.
//
// Block 0 and the newest block are never skipped, and every split starts from the running max that
// these two give: it computes their scores again, so that none waits for another. The first split
// alone adds their values.
//
// Each of four warps takes a quarter of a block's keys, for the scores as for the values, and adds
// up its own share of the output; the row maxima are exchanged through shared memory.
#pragma once
#include "splits.cuh"

namespace bsa::cuda {

// What the warps tell each other of a row: its maximum in their keys, and their share of its sum.
struct Exchange {
  float most[kWarps][kMaxGroup], l[kWarps][kMaxGroup];
  __device__ __forceinline__ void tell(const float (&m)[2], const Row (&rows)[2]) {
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const float sum = sum_of_quad(rows[x].l);
      if (lane_index() % 4) continue;
      most[warp_index()][lane_index() / 4 + 8 * x] = m[x];
      l[warp_index()][lane_index() / 4 + 8 * x] = sum;
    }
  }
  __device__ __forceinline__ float most_of(int row) const {
    return max_or_nan(max_or_nan(most[0][row], most[1][row]),
                      max_or_nan(most[2][row], most[3][row]));
  }
  __device__ __forceinline__ float sum_of(int row) const {
    return (l[0][row] + l[1][row]) + (l[2][row] + l[3][row]);
  }
};

// What all warps know of a block once they have told each other.
struct Decision {
  float most[2];  // of the lane's rows
  bool seen;      // any row sees any of its keys
  bool skip;
  __device__ __forceinline__ bool keep() const { return seen && !skip; }
};

// C says the type of the elements, sizes, and how blocks lie in shared memory.
template <class C>
struct Group : Work {
  using Type = typename C::Type;
  static constexpr int kSteps = C::kHead / 16, kMyKeys = C::kBlockK / kWarps;
  static constexpr bool kHoldsRules = C::kHead <= 192;  // else there are no registers for them
  using Scores = float[kMyKeys / 8][4];
  using Weights = uint32_t[kMyKeys / 16][4];

  const int keys_end;  // from here on there may be anything in V, NaN too
  const SplitBlocks blocks;
  const bool is_first;
  const int count;     // steps; 0 where there is nothing to add
  const float splits;  // how many share the seed's sum

  uint32_t q[kSteps][4];
  RowRule rules[kHoldsRules ? 2 : 1];
  Row rows[2];             // l: this lane's share of this split's own blocks
  float base[2] = {0, 0};  // and of this split's share of the seed's sum
  float o[C::kValue / 8][4];
  int visited = 0, skipped = 0, decided = 0;

  // Of a thread block in a grid (splits, Lq * Hkv, B).
  __device__ __forceinline__ explicit Group(const Params& p_)
      : Work(p_),
        keys_end(p_.causal ? min(r.keys, here + 1) : r.keys),
        blocks(blocks_of_work()),
        is_first(split == 0),
        count(is_first || blocks.own ? blocks.seeds + blocks.own : 0),
        splits(float(p_.splits_seen ? p_.splits_seen[batch * p_.Lq + row] : blocks.splits)) {}

  __device__ __forceinline__ int block(int t) const { return blocks.at(p, t); }
  // Whether a step's values are wanted, if it is kept.
  __device__ __forceinline__ bool adds_values(int t) const { return is_first || t >= blocks.seeds; }
  __device__ __forceinline__ static int my_keys() { return warp_index() * kMyKeys; }

  // Reads Q and the rules, which may take a while.
  __device__ __forceinline__ void begin() {
    load_q(q);
    if constexpr (kHoldsRules)
      for (int x = 0; x < 2; ++x) rules[x] = read_rule(x);
#pragma unroll
    for (int j = 0; j < C::kValue / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[j][i] = 0;
  }

  // This warp's scores of a block, still to be multiplied with what is returned. Tells the others
  // their maxima; a barrier must follow.
  __device__ __forceinline__ float score(uint32_t keys, int block, Scores& s, Exchange& exchange) {
#pragma unroll
    for (int j = 0; j < kMyKeys / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][i] = 0;
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      add_scores<Type, typename C::Keys, kMyKeys>(s, q[step], keys, my_keys(), step);
    const float unit = cap_scores(p, s);
    if (p.group < kMaxGroup || !all_visible<C::kBlockK>(p, r, block, here, here))
      hide_scores(p, r, batch, {{here, here}, {is_real(0), is_real(1)}},
                  block * C::kBlockK + my_keys(), s);
    float most[2];
    max_of_rows(s, most);
    Row with_base[2] = {rows[0], rows[1]};
    for (int x = 0; x < 2; ++x) most[x] *= unit, with_base[x].l += base[x];
    exchange.tell(most, with_base);
    return unit;
  }

  // From here on every warp knows, and decides, the same.
  __device__ __forceinline__ Decision decide(const Exchange& exchange, int t, int block) {
    const bool in_seed = t < blocks.seeds;
    Decision d;
    bool agree = p.log_lambda.data || p.threshold.data || p.budget.data, sees_any = false;
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      d.most[x] = exchange.most_of(member(x));
      const float sum = exchange.sum_of(member(x));
      const RowRule rule = kHoldsRules ? rules[kHoldsRules ? x : 0] : read_rule(x);
      agree = agree && (!is_real(x) || rows[x].agrees(p, rule, d.most[x], sum, C::kBlockK));
      sees_any = sees_any || !(d.most[x] == kMinusInfinity);
    }
    d.seen = __any_sync(kAllLanes, sees_any);
    const bool must_keep =
        in_seed || (p.threshold.data && (block == blocks.newest || (p.keep_sink && block == 0)));
    d.skip = __all_sync(kAllLanes, agree) && d.seen && !must_keep;
    visited += d.seen && (!in_seed || is_first), skipped += d.skip, decided += !in_seed;
    if (d.skip && p.skips && threadIdx.x == 0) mark_skipped(p, voter_row(), block);
    return d;
  }

  // A kept block's scores become weights, and what was summed up so far shrinks.
  __device__ __forceinline__ void keep(Scores& s, float unit, int t, const Decision& d,
                                       Weights& weights) {
    float shrinks[2], sums[2];
    for (int x = 0; x < 2; ++x) {
      shrinks[x] = rows[x].raise(d.most[x]);
      sums[x] = rows[x].l, base[x] *= shrinks[x];
    }
    weigh(s, rows, unit);
    shrink(o, shrinks);
    for (int x = 0; x < 2; ++x)
      if (t < blocks.seeds) base[x] += (rows[x].l - sums[x]) / splits, rows[x].l = sums[x];
#pragma unroll
    for (int step = 0; step < kMyKeys / 16; ++step)
      pack_weights<Type>(weights[step], s[2 * step], s[2 * step + 1]);
  }

  __device__ __forceinline__ void add(const Weights& weights, uint32_t values) {
    const uint32_t at = values_at<typename C::Values>(values, my_keys());
#pragma unroll
    for (int step = 0; step < kMyKeys / 16; ++step)
      add_values<Type, typename C::Values, C::kValue>(o, weights[step],
                                                      at + step * 16 * C::Values::kRowBytes);
  }

  __device__ __forceinline__ void saw(const Decision& d) {
    for (int x = 0; x < 2; ++x) rows[x].saw(p, d.most[x], C::kBlockK, d.skip);
  }

  // Adds up the warps' shares and writes the split's results. `shares` is room for them in shared
  // memory, [kWarps, kMaxGroup, kValue], which nobody uses any more once all threads are here.
  __device__ __forceinline__ void end(float* shares, Exchange& exchange) {
    for (int x = 0; x < 2; ++x)
      if (is_first) rows[x].l += base[x] * splits;
    __syncthreads();
    const float most[2] = {0, 0};
    exchange.tell(most, rows);
    const int64_t first_at = ((int64_t(batch) * p.Hq + first_head) * p.Lq + row) * p.splits + split;
    const int64_t step = int64_t(p.Lq) * p.splits;
    write_shares(shares, first_at, step);  // its barrier comes before the sums are read
    for (int x = 0; x < 2; ++x) {
      if (warp_index() || lane_index() % 4 || !is_real(x)) continue;
      float* sums = p.partial_sums + (first_at + member(x) * step) * 4;
      sums[0] = rows[x].m, sums[1] = exchange.sum_of(member(x));
      sums[2] = rows[x].top, sums[3] = rows[x].c;
    }
    add_counts(visited, skipped);
  }

 private:
  __device__ __forceinline__ SplitBlocks blocks_of_work() const {
    SplitBlocks found = blocks_of_split<C::kBlockK>(p, r, split, here);
    if (p.open_blocks) found.visit_listed(p, list_at());
    return found;
  }

  __device__ __forceinline__ void write_shares(float* shares, int64_t first_at, int64_t step) {
#pragma unroll
    for (int j = 0; j < C::kValue / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at_row = lane_index() / 4 + 8 * (i / 2);
        const int column = 8 * j + 2 * (lane_index() % 4) + i % 2;
        shares[(warp_index() * kMaxGroup + at_row) * C::kValue + column] = o[j][i];
      }
    __syncthreads();
    for (int i = threadIdx.x; i < p.group * C::kValue; i += kThreads) {
      const int at_row = i / C::kValue, column = i % C::kValue;
      if (column >= p.Dv) continue;
      float sum = 0;
      for (int warp = 0; warp < kWarps; ++warp)
        sum += shares[(warp * kMaxGroup + at_row) * C::kValue + column];
      p.partial_out[(first_at + at_row * step) * p.Dv + column] = sum;
    }
  }
};

}  // namespace bsa::cuda
