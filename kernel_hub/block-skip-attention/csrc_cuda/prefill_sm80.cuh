// Prefill on sm_80 and later: one block of threads computes one block row of one query head.
//
// Four warps of 16 rows each, Q in registers, K in a ring that is filled ahead. For each block of
// keys the warps compute their scores and row maxima and vote, and only if one row wants the block
// are the exponentials taken, V loaded and multiplied: a skip is a branch around all three.
//
// With a rule, V is asked for after the vote, so that what is skipped is never read; its way to
// shared memory is hidden by the exponentials and by the other thread blocks of the multiprocessor
// (speculating would read all of V). Without a rule, the same loop asks for V before the scores,
// and has no vote: what skipping needs does not slow dense attention down.
#pragma once
#include "blocks_sm80.cuh"

namespace bsa::cuda {

// Head sizes are rounded up to kHead and kValue, multiples of 64: the rest is zeros.
template <class Type_, int kHead_, int kValue_, int kBlockK_, bool kSkips_>
struct Prefill {
  using Type = Type_;
  static constexpr int kHead = kHead_, kValue = kValue_, kBlockQ = 64, kBlockK = kBlockK_;
  static constexpr bool kSkips = kSkips_;
  static constexpr int kKeyBytes = kBlockK * kHead * 2, kValueBytes = kBlockK * kValue * 2;
  static constexpr int kQueryBytes = kBlockQ * kHead * 2;
  // Where the sums and scores leave no registers for Q, it is read again for every block.
  static constexpr bool kSharedQ = kHead > 192 || (kHead > 64 && kBlockK > 64);
  static constexpr int kUnrolled = kSharedQ ? 4 : kHead / 16;  // steps of the scores' product
  // Blocks of K on their way or in use. As many as leave room for two thread blocks of A100's 164
  // KiB of shared memory, or for one in the 99 KiB of the smaller GPUs.
  static constexpr int kRing = kSharedQ ? 1 : kKeyBytes <= 8192 ? 3 : 2;
  static constexpr int kAhead = kRing > 1 ? kRing - 1 : 1;  // blocks of K asked for before the loop
  // Whether a block of K is asked for after V, and need not be there before V is used.
  static constexpr int kLaterCopies = kSkips && kRing > 1 ? 0 : 1;
  static constexpr int kValueAt = kRing * kKeyBytes;
  // Q is first put where something else comes later: the values, or the last block of the ring.
  static constexpr int kQueryAt = kSharedQ                     ? kValueAt + kValueBytes
                                  : kValueBytes >= kQueryBytes ? kValueAt
                                                               : kValueAt - kKeyBytes;
  // Thread blocks to a multiprocessor that registers must suffice for.
  static constexpr int kResident = kBlockK == 64 && kHead <= (kSkips ? 64 : 128) ? 3 : 1;
  static constexpr int kSharedBytes = kValueAt + kValueBytes + kSharedQ * kQueryBytes;
  static_assert(kQueryAt >= 0 && (kRing > 1 || kQueryAt >= kValueAt));
};

// Rows that stand before the first key are zeros; no row of blocks covers them.
template <class C>
__device__ void write_unseen_rows(const Params& p, int first, int row_block, int head, int batch) {
  const int start = row_block * C::kBlockQ;
  for (int row = start; row < min(start + C::kBlockQ, first); ++row) {
    const int64_t at = (int64_t(batch) * p.Lq + row) * p.Hq + head;
    auto* out = static_cast<uint16_t*>(p.out) + at * p.Dv;
    for (int i = threadIdx.x; i < p.Dv; i += kThreads) out[i] = 0;
    if (threadIdx.x) continue;
    const int64_t row_at = (int64_t(batch) * p.Hq + head) * p.Lq + row;
    p.lse[row_at] = kMinusInfinity;
    if (p.dropped) p.dropped[row_at] = 0;
  }
}

template <class C>
__device__ __forceinline__ void write_rows(const Params& p, const float (&o)[C::kValue / 8][4],
                                           const Row (&rows)[2], int first, int head, int batch) {
  using Type = typename C::Type;
  const float sink = p.sinks ? p.sinks[head] : kMinusInfinity;
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    const int row = first + 8 * x;
    if (row >= p.Lq) continue;
    const RowEnd end = end_of_row(rows[x], sink);
    const int64_t at = (int64_t(batch) * p.Lq + row) * p.Hq + head;
    auto* out = static_cast<uint16_t*>(p.out) + at * p.Dv;
#pragma unroll
    for (int j = 0; j < C::kValue / 8; ++j) {
      const int column = 8 * j + 2 * (lane_index() % 4);
      const uint32_t both = pack<Type>(o[j][2 * x] * end.factor, o[j][2 * x + 1] * end.factor);
      if (column < p.Dv) *reinterpret_cast<uint32_t*>(out + column) = end.sees ? both : 0;
    }
    if (lane_index() % 4) continue;
    const int64_t row_at = (int64_t(batch) * p.Hq + head) * p.Lq + row;
    p.lse[row_at] = end.lse;
    if (p.dropped) p.dropped[row_at] = end.dropped;
  }
}

// Grid (NQ, Hq, B).
template <class C>
__global__ void __launch_bounds__(kThreads, C::kResident)
    prefill_kernel(const __grid_constant__ Params p) {
  using Type = typename C::Type;
  constexpr int kSteps = C::kHead / 16;
  // The longest block rows come first: the last to start are short ones.
  const int row_block = p.NQ - 1 - int(blockIdx.x), head = blockIdx.y, batch = blockIdx.z;
  const Request r = request_of(p, batch);
  const int first = first_row(p, r);
  write_unseen_rows<C>(p, first, row_block, head, batch);
  const int start = first + row_block * C::kBlockQ;
  if (start >= p.Lq) return;

  const int end = min(start + C::kBlockQ, p.Lq), padding = end_row(p, r);
  const Blocks blocks = blocks_of_rows<C::kBlockK>(p, r, start, end);
  const int count = blocks.count();
  const int kv_head = head / p.group;
  const int64_t k_at = batch * p.k.batch + kv_head * p.k.head + r.first * p.k.row;
  const int64_t v_at = batch * p.v.batch + kv_head * p.v.head + r.first * p.v.row;
  const uint32_t memory = shared_address(dynamic_shared());
  const uint32_t values = memory + C::kValueAt, queries = memory + C::kQueryAt;

  const auto load_keys = [&](int t) {
    const int column = visit(p, blocks, t) * C::kBlockK;
    load_block<C::kBlockK, C::kHead>(memory + t % C::kRing * C::kKeyBytes, p.k.data,
                                     k_at + column * p.k.row, p.k.row, r.keys - column, p.D);
  };
  const auto load_values = [&](int block) {
    const int column = block * C::kBlockK;
    load_block<C::kBlockK, C::kValue>(values, p.v.data, v_at + column * p.v.row, p.v.row,
                                      r.keys - column, p.Dv);
    commit_copies();
  };

  load_block<C::kBlockQ, C::kHead>(queries, p.q.data,
                                   batch * p.q.batch + head * p.q.head + start * p.q.row, p.q.row,
                                   end - start, p.D);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  const int my_rows = warp_index() * 16;
  uint32_t q[C::kSharedQ ? 1 : kSteps][4];
  if constexpr (!C::kSharedQ) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) load_left<C::kHead>(q[step], queries, my_rows, step);
    __syncthreads();  // Q's place may be overwritten
  }
#pragma unroll
  for (int t = 0; t < C::kAhead; ++t) {
    if (t < count) load_keys(t);
    commit_copies();
  }

  const int row = start + my_rows + lane_index() / 4;  // and row + 8
  // Right padding does not vote, unless there is nothing else.
  const int voters = start >= padding ? p.Lq : min(padding, p.Lq);
  Row rows[2];
  float o[C::kValue / 8][4] = {};
  int visited = 0, skipped = 0;
  for (int t = 0; t < count; ++t) {
    const int block = visit(p, blocks, t);
    wait_for_copies<C::kAhead - 1>();
    __syncthreads();  // this block of K is there for all, and all are done with the last
    if constexpr (!C::kSkips) load_values(block);
    if constexpr (C::kRing > 1) {
      if (t + C::kRing - 1 < count) load_keys(t + C::kRing - 1);
      commit_copies();
    }

    const uint32_t keys = memory + t % C::kRing * C::kKeyBytes;
    float s[C::kBlockK / 8][4] = {};
#pragma unroll C::kUnrolled
    for (int step = 0; step < kSteps; ++step) {
      if constexpr (C::kSharedQ) load_left<C::kHead>(q[0], queries, my_rows, step);
      add_scores<Type, Rows<C::kHead>, C::kBlockK>(s, q[C::kSharedQ ? 0 : step], keys, 0, step);
    }
    const float unit = cap_scores(p, s);
    if (end - start < C::kBlockQ ||
        !all_visible<C::kBlockK>(p, r, block, r.offset + start, r.offset + end - 1))
      hide_scores(p, r, batch, {{r.offset + row, r.offset + row + 8}, {row < end, row + 8 < end}},
                  block * C::kBlockK, s);
    float most[2];
    max_of_rows(s, most);
    for (int x = 0; x < 2; ++x) most[x] *= unit;

    bool seen = true;  // without holes, any block in the range is seen
    if (p.valid) seen = __syncthreads_or(!(most[0] == kMinusInfinity && most[1] == kMinusInfinity));
    bool skip = false;
    if constexpr (C::kSkips) {
      // Read again every time: the registers are worth more.
      const RowRule rule = rule_of(p, batch, head, row_block);
      bool agree = true;
      for (int x = 0; x < 2; ++x) {
        float sum = rows[x].l;
        if (p.budget.data) sum = sum_of_quad(sum);
        agree =
            agree && (row + 8 * x >= voters || rows[x].agrees(p, rule, most[x], sum, C::kBlockK));
      }
      const bool must_keep =
          p.threshold.data && (blocks.on_diagonal(block) || (p.keep_sink && block == 0));
      skip = __syncthreads_and(agree) && seen && !must_keep;
    }
    visited += seen, skipped += skip;
    for (int x = 0; x < 2; ++x) rows[x].saw(p, most[x], C::kBlockK, skip);

    const auto load_next_keys = [&] {  // where there is room for one block only
      if constexpr (C::kRing > 1) return;
      if (t + 1 < count) load_keys(t + 1);
      commit_copies();
    };
    if constexpr (C::kRing == 1 && !C::kSkips) __syncthreads();  // else the vote was a barrier
    if (seen && !skip) {
      if constexpr (C::kSkips) load_values(block);
      load_next_keys();
      float shrinks[2];
      for (int x = 0; x < 2; ++x) shrinks[x] = rows[x].raise(most[x]);
      weigh(s, rows, unit);
      shrink(o, shrinks);
      wait_for_copies<C::kLaterCopies>();
      __syncthreads();
      const uint32_t at = values_at<Rows<C::kValue>>(values, 0);
#pragma unroll
      for (int step = 0; step < C::kBlockK / 16; ++step) {
        uint32_t weights[4];
        pack_weights<Type>(weights, s[2 * step], s[2 * step + 1]);
        add_values<Type, Rows<C::kValue>, C::kValue>(o, weights, at + step * 16 * C::kValue * 2);
      }
    } else {
      load_next_keys();
      if (skip && p.skips && threadIdx.x == 0)
        mark_skipped(p, (int64_t(batch) * p.Hq + head) * p.NQ + row_block, block);
    }
  }
  wait_for_copies<0>();
  for (int x = 0; x < 2; ++x) rows[x].l = sum_of_quad(rows[x].l);
  write_rows<C>(p, o, rows, row, head, batch);
  if (threadIdx.x == 0 && start < padding) {
    auto* counts = p.counts + (int64_t(batch) * p.Hq + head) * 2;
    atomicAdd(counts, static_cast<unsigned long long>(visited));
    if (skipped) atomicAdd(counts + 1, static_cast<unsigned long long>(skipped));
  }
}

}  // namespace bsa::cuda
