// Decode on sm_80 and later: one block of threads computes one split of the keys, for one position
// and GQA group, whose heads are the rows of one tensor-core product; a second kernel joins splits.
//
// Block 0 and the newest block are never skipped, and every split starts from the running max that
// these two give: it computes their scores again, so that none waits for another. The first split
// alone adds their values.
//
// Decoding waits for memory, so K runs ahead in a ring of its own that no decision holds up. V is
// fetched ahead too, as long as few blocks are skipped; once 30% are, only after the vote. That is
// a matter of time alone: it changes no result.
//
// Each of the four warps takes a quarter of a block's keys, for the scores as for the values, and
// adds up its own share of the output; the row maxima are exchanged through shared memory.
#pragma once
#include "splits.cuh"

namespace bsa::cuda {

constexpr int kMaxGroup = 16;  // heads of a group: the rows of one product

template <class Type_, int kHead_, int kValue_, int kBlockK_>
struct Decode {
  using Type = Type_;
  static constexpr int kHead = kHead_, kValue = kValue_, kBlockK = kBlockK_;
  static constexpr int kKeyBytes = kBlockK * kHead * 2, kValueBytes = kBlockK * kValue * 2;
  static constexpr int kRing = kKeyBytes <= 8192 ? 4 : kKeyBytes <= 16384 ? 3 : 2;
  static constexpr int kValueRing = kValueBytes <= 8192 ? 3 : kValueBytes <= 16384 ? 2 : 1;
  // Else V could be asked for where an older block, skipped and so never waited for, still arrives.
  static_assert(kValueRing >= kRing - 1);
  static constexpr int kValueAt = kRing * kKeyBytes;
  static constexpr int kExchangeAt = kValueAt + kValueRing * kValueBytes;
  static constexpr int kSharedBytes = kExchangeAt + kWarps * kMaxGroup * 2 * 4;
  // At the end the warps' shares of the output meet where K and V were.
  static_assert(kWarps * kMaxGroup * kValue * 4 <= kExchangeAt);
};

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

// Q of the group's heads as left factors, straight from global memory; no head, no dimension:
// zeros.
template <class C>
__device__ __forceinline__ void load_group(const Params& p, int64_t at,
                                           uint32_t (&q)[C::kHead / 16][4]) {
  const auto* data = static_cast<const uint16_t*>(p.q.data) + at;
#pragma unroll
  for (int step = 0; step < C::kHead / 16; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int member = lane_index() / 4 + 8 * (i % 2);
      const int column = 16 * step + 2 * (lane_index() % 4) + 8 * (i / 2);
      const bool there = member < p.group && column < p.D;
      q[step][i] =
          there ? *reinterpret_cast<const uint32_t*>(data + member * p.q.head + column) : 0;
    }
}

// The warps' shares of the output, added up and written.
template <class C>
__device__ __forceinline__ void write_partial(const Params& p, const float (&o)[C::kValue / 8][4],
                                              int64_t first_at, int64_t step) {
  auto* shares = reinterpret_cast<float*>(dynamic_shared());
  __syncthreads();
#pragma unroll
  for (int j = 0; j < C::kValue / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int member = lane_index() / 4 + 8 * (i / 2);
      const int column = 8 * j + 2 * (lane_index() % 4) + i % 2;
      shares[(warp_index() * kMaxGroup + member) * C::kValue + column] = o[j][i];
    }
  __syncthreads();
  for (int i = threadIdx.x; i < p.group * C::kValue; i += kThreads) {
    const int member = i / C::kValue, column = i % C::kValue;
    if (column >= p.Dv) continue;
    float sum = 0;
    for (int warp = 0; warp < kWarps; ++warp)
      sum += shares[(warp * kMaxGroup + member) * C::kValue + column];
    p.partial_out[(first_at + member * step) * p.Dv + column] = sum;
  }
}

// Grid (splits, Lq * Hkv, B).
template <class C>
__global__ void __launch_bounds__(kThreads) decode_kernel(const __grid_constant__ Params p) {
  using Type = typename C::Type;
  constexpr int kSteps = C::kHead / 16, kMyKeys = C::kBlockK / kWarps;
  const int split = blockIdx.x, kv_head = blockIdx.y % p.Hkv, row = blockIdx.y / p.Hkv;
  const int batch = blockIdx.z, first_head = kv_head * p.group;
  const Request r = request_of(p, batch);
  const int here = r.offset + row;
  // Decisions are numbered from the first row that may see a key.
  const int vote_row = p.causal ? max(row - first_row(p, r), 0) : row;
  const SplitBlocks blocks = blocks_of_split<C::kBlockK>(p, r, split, here);
  const bool is_first = split == 0, has_own = blocks.end > blocks.begin;
  const int count = is_first || has_own ? blocks.count() : 0;  // else there is nothing to add
  const float splits = float(p.splits_seen ? p.splits_seen[batch * p.Lq + row] : blocks.splits);

  const int64_t k_at = batch * p.k.batch + kv_head * p.k.head + r.first * p.k.row;
  const int64_t v_at = batch * p.v.batch + kv_head * p.v.head + r.first * p.v.row;
  unsigned char* const memory = dynamic_shared();
  const uint32_t ring = shared_address(memory), value_ring = ring + C::kValueAt;
  Exchange& exchange = *reinterpret_cast<Exchange*>(memory + C::kExchangeAt);

  const auto load_keys = [&](int t) {
    const int column = blocks.at(p, t) * C::kBlockK;
    load_block<C::kBlockK, C::kHead>(ring + t % C::kRing * C::kKeyBytes, p.k.data,
                                     k_at + column * p.k.row, p.k.row, r.keys - column, p.D);
  };
  const auto load_values = [&](int t) {
    const int column = blocks.at(p, t) * C::kBlockK;
    load_block<C::kBlockK, C::kValue>(value_ring + t % C::kValueRing * C::kValueBytes, p.v.data,
                                      v_at + column * p.v.row, p.v.row, r.keys - column, p.Dv);
  };
  // Whether a step's values are wanted, if it is kept.
  const auto adds_values = [&](int t) { return is_first || t >= blocks.seeds; };

  unsigned fetched = 0;  // bit i: V of slot i was asked for
#pragma unroll
  for (int t = 0; t < C::kRing - 1; ++t) {
    if (t < count) load_keys(t);
    if (t < C::kValueRing - 1 && t < count && adds_values(t)) {
      load_values(t);
      fetched |= 1u << t;
    }
    commit_copies();
  }
  uint32_t q[kSteps][4];
  load_group<C>(p, batch * p.q.batch + first_head * p.q.head + row * p.q.row, q);

  RowRule rules[2];
  TwoRows place_of;
  int member[2];
  for (int x = 0; x < 2; ++x) {
    member[x] = lane_index() / 4 + 8 * x;
    place_of.position[x] = here;
    place_of.real[x] = member[x] < p.group;
    rules[x] = rule_of(p, batch, first_head + (place_of.real[x] ? member[x] : 0), vote_row);
  }
  Row rows[2];             // l: this lane's share of this split's own blocks
  float base[2] = {0, 0};  // and of this split's share of the seed's sum
  float o[C::kValue / 8][4] = {};
  int visited = 0, skipped = 0, decided = 0;
  for (int t = 0; t < count; ++t) {
    const int block = blocks.at(p, t);
    const bool in_seed = t < blocks.seeds;
    wait_for_copies<C::kRing - 2>();
    __syncthreads();  // this block of K is there for all, and all are done with the last
    if (t + C::kRing - 1 < count) load_keys(t + C::kRing - 1);
    const int ahead = t + C::kValueRing - 1;
    if (ahead < count && adds_values(ahead) && 10 * skipped <= 3 * decided) {
      load_values(ahead);
      fetched |= 1u << ahead % C::kValueRing;
    }
    commit_copies();

    const uint32_t keys = ring + t % C::kRing * C::kKeyBytes;
    const int my_keys = warp_index() * kMyKeys;
    float s[kMyKeys / 8][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      add_scores<Type, C::kHead, kMyKeys>(s, q[step], keys, my_keys, step);
    const float unit = cap_scores(p, s);
    if (p.group < kMaxGroup || !all_visible<C::kBlockK>(p, r, block, here, here))
      hide_scores(p, r, batch, place_of, block * C::kBlockK + my_keys, s);
    float most[2];
    max_of_rows(s, most);
    for (int x = 0; x < 2; ++x) most[x] *= unit;
    Row with_base[2] = {rows[0], rows[1]};
    for (int x = 0; x < 2; ++x) with_base[x].l += base[x];
    exchange.tell(most, with_base);
    __syncthreads();

    // From here on every warp knows, and decides, the same.
    bool agree = p.log_lambda.data || p.threshold.data || p.budget.data, sees_any = false;
    for (int x = 0; x < 2; ++x) {
      most[x] = exchange.most_of(member[x]);
      const float sum = exchange.sum_of(member[x]);
      agree = agree && (!place_of.real[x] || rows[x].agrees(p, rules[x], most[x], sum, C::kBlockK));
      sees_any = sees_any || !(most[x] == kMinusInfinity);
    }
    const bool seen = __any_sync(kAllLanes, sees_any);
    const bool must_keep =
        in_seed || (p.threshold.data && (block == blocks.newest || (p.keep_sink && block == 0)));
    const bool skip = __all_sync(kAllLanes, agree) && seen && !must_keep;
    visited += seen && (!in_seed || is_first), skipped += skip, decided += !in_seed;
    if (skip && p.skips && threadIdx.x == 0)
      mark_skipped(p, (int64_t(batch) * p.Hkv + kv_head) * p.NQ + vote_row, block);

    const unsigned slot = 1u << t % C::kValueRing;
    if (seen && !skip) {
      float shrinks[2], sums[2];
      for (int x = 0; x < 2; ++x) {
        shrinks[x] = rows[x].raise(most[x]);
        sums[x] = rows[x].l, base[x] *= shrinks[x];
      }
      weigh(s, rows, unit);
      shrink(o, shrinks);
      for (int x = 0; x < 2; ++x)
        if (in_seed) base[x] += (rows[x].l - sums[x]) / splits, rows[x].l = sums[x];
      if (adds_values(t)) {
        if (fetched & slot) {
          wait_for_copies<C::kValueRing - 1>();
        } else {
          load_values(t);
          commit_copies();
          wait_for_copies<0>();
        }
        __syncthreads();
        add_values<Type, C::kValue, kMyKeys>(o, s, value_ring + t % C::kValueRing * C::kValueBytes,
                                             my_keys);
      }
    }
    fetched &= ~slot;
    for (int x = 0; x < 2; ++x) rows[x].saw(p, most[x], C::kBlockK, skip);
  }
  wait_for_copies<0>();

  for (int x = 0; x < 2; ++x)
    if (is_first) rows[x].l += base[x] * splits;
  __syncthreads();
  const float most[2] = {0, 0};
  exchange.tell(most, rows);
  const int64_t first_at = ((int64_t(batch) * p.Hq + first_head) * p.Lq + row) * p.splits + split;
  const int64_t step = int64_t(p.Lq) * p.splits;
  write_partial<C>(p, o, first_at, step);  // its barriers come before the sums are read
  for (int x = 0; x < 2; ++x) {
    if (warp_index() || lane_index() % 4 || !place_of.real[x]) continue;
    float* sums = p.partial_sums + (first_at + member[x] * step) * 4;
    sums[0] = rows[x].m, sums[1] = exchange.sum_of(member[x]);
    sums[2] = rows[x].top, sums[3] = rows[x].c;
  }
  // Positions after the last valid key are padding.
  if (int(threadIdx.x) < p.group && (!p.causal || here < r.keys)) {
    auto* counts = p.counts + (int64_t(batch) * p.Hq + first_head + threadIdx.x) * 2;
    if (visited) atomicAdd(counts, static_cast<unsigned long long>(visited));
    if (skipped) atomicAdd(counts + 1, static_cast<unsigned long long>(skipped));
  }
}

// Joins the splits of one query head and position; grid (Lq * Hq, B).
template <class Type>
__global__ void __launch_bounds__(kThreads) join_kernel(const __grid_constant__ Params p) {
  const int head = blockIdx.x % p.Hq, row = blockIdx.x / p.Hq, batch = blockIdx.y;
  const int64_t row_at = (int64_t(batch) * p.Hq + head) * p.Lq + row;
  const float* sums = p.partial_sums + row_at * p.splits * 4;
  Row all;
  float unit = kMinusInfinity;  // of the bounds on what was dropped
  for (int i = 0; i < p.splits; ++i) {
    all.m = fmaxf(all.m, sums[4 * i]);
    all.top = max_or_nan(all.top, sums[4 * i + 2]);
    if (sums[4 * i + 3] > 0) unit = fmaxf(unit, sums[4 * i + 2]);
  }
  const float shift = all.shift();
  for (int i = 0; i < p.splits; ++i) {
    all.l += sums[4 * i + 1] * exp2_fast((sums[4 * i] - shift) * kLog2E);
    const float c = sums[4 * i + 3];
    if (c > 0) all.c += c * exp2_fast((sums[4 * i + 2] - unit) * kLog2E);
  }
  const bool sees = !(all.top == kMinusInfinity);
  if (all.c > 0 && sees) all.top = unit;
  const RowEnd end = end_of_row(all, p.sinks ? p.sinks[head] : kMinusInfinity);
  const float* partial = p.partial_out + row_at * p.splits * p.Dv;
  auto* out = static_cast<uint16_t*>(p.out) + ((int64_t(batch) * p.Lq + row) * p.Hq + head) * p.Dv;
  for (int i = threadIdx.x; i < p.Dv; i += kThreads) {
    float sum = 0;
    for (int split = 0; split < p.splits; ++split)
      sum += partial[int64_t(split) * p.Dv + i] * exp2_fast((sums[4 * split] - shift) * kLog2E);
    out[i] = sees ? uint16_t(pack<Type>(sum * end.factor, 0.0f)) : 0;
  }
  if (threadIdx.x) return;
  p.lse[row_at] = end.lse;
  if (p.dropped) p.dropped[row_at] = end.dropped;
}

}  // namespace bsa::cuda
