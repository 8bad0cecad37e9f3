// Decode on sm_80 and later: one block of threads computes one split of the keys, for one position
// and GQA group (decode_group.cuh); a second kernel joins the splits.
//
// Decoding waits for memory, so K runs ahead in a ring of its own that no decision holds up. V is
// fetched ahead too, as long as few blocks are skipped; once 30% are, only after the vote. That is
// a matter of time alone: it changes no result.
#pragma once
#include "decode_group.cuh"

namespace bsa::cuda {

template <class Type_, int kHead_, int kValue_, int kBlockK_>
struct Decode {
  using Type = Type_;
  static constexpr int kHead = kHead_, kValue = kValue_, kBlockK = kBlockK_;
  using Keys = Rows<kHead>;
  using Values = Rows<kValue>;
  static constexpr int kKeyBytes = kBlockK * kHead * 2, kValueBytes = kBlockK * kValue * 2;
  static constexpr int kRing = kKeyBytes <= 8192 ? 4 : kKeyBytes <= 16384 ? 3 : 2;
  static constexpr int kValueRing = kValueBytes <= 8192 ? 3 : kValueBytes <= 16384 ? 2 : 1;
  // Else V could be asked for where an older block, skipped and so never waited for, still arrives.
  static_assert(kValueRing >= kRing - 1);
  static constexpr int kValueAt = kRing * kKeyBytes;
  static constexpr int kExchangeAt = kValueAt + kValueRing * kValueBytes;
  static constexpr int kSharedBytes = kExchangeAt + sizeof(Exchange);
  // At the end the warps' shares of the output meet where K and V were.
  static_assert(kWarps * kMaxGroup * kValue * 4 <= kExchangeAt);
};

// Grid (splits, Lq * Hkv, B).
template <class C>
__global__ void __launch_bounds__(kThreads) decode_kernel(const __grid_constant__ Params p) {
  Group<C> group(p);
  const Request& r = group.r;
  const int count = group.count;
  const int64_t k_at = group.batch * p.k.batch + group.kv_head * p.k.head + r.first * p.k.row;
  const int64_t v_at = group.batch * p.v.batch + group.kv_head * p.v.head + r.first * p.v.row;
  unsigned char* const memory = dynamic_shared();
  const uint32_t ring = shared_address(memory), value_ring = ring + C::kValueAt;
  Exchange& exchange = *reinterpret_cast<Exchange*>(memory + C::kExchangeAt);

  const auto load_keys = [&](int t) {
    const int column = group.block(t) * C::kBlockK;
    load_block<C::kBlockK, C::kHead>(ring + t % C::kRing * C::kKeyBytes, p.k.data,
                                     k_at + column * p.k.row, p.k.row, r.keys - column, p.D);
  };
  const auto load_values = [&](int t) {
    const int column = group.block(t) * C::kBlockK;
    load_block<C::kBlockK, C::kValue>(value_ring + t % C::kValueRing * C::kValueBytes, p.v.data,
                                      v_at + column * p.v.row, p.v.row, group.keys_end - column,
                                      p.Dv);
  };

  unsigned fetched = 0;  // bit i: V of slot i was asked for
#pragma unroll
  for (int t = 0; t < C::kRing - 1; ++t) {
    if (t < count) load_keys(t);
    if (t < C::kValueRing - 1 && t < count && group.adds_values(t)) {
      load_values(t);
      fetched |= 1u << t;
    }
    commit_copies();
  }
  group.begin();

  for (int t = 0; t < count; ++t) {
    const int block = group.block(t);
    wait_for_copies<C::kRing - 2>();
    __syncthreads();  // this block of K is there for all, and all are done with the last
    if (t + C::kRing - 1 < count) load_keys(t + C::kRing - 1);
    const int ahead = t + C::kValueRing - 1;
    if (ahead < count && group.adds_values(ahead) && 10 * group.skipped <= 3 * group.decided) {
      load_values(ahead);
      fetched |= 1u << ahead % C::kValueRing;
    }
    commit_copies();

    typename Group<C>::Scores s;
    const float unit = group.score(ring + t % C::kRing * C::kKeyBytes, block, s, exchange);
    __syncthreads();
    const Decision decision = group.decide(exchange, t, block);

    const unsigned slot = 1u << t % C::kValueRing;
    if (decision.keep()) {
      typename Group<C>::Weights weights;
      group.keep(s, unit, t, decision, weights);
      if (group.adds_values(t)) {
        if (fetched & slot) {
          wait_for_copies<C::kValueRing - 1>();
        } else {
          load_values(t);
          commit_copies();
          wait_for_copies<0>();
        }
        __syncthreads();
        group.add(weights, value_ring + t % C::kValueRing * C::kValueBytes);
      }
    }
    fetched &= ~slot;
    group.saw(decision);
  }
  wait_for_copies<0>();
  group.end(reinterpret_cast<float*>(memory), exchange);
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
