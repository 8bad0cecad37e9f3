// The order of the tasks. Those of one key/value head follow each other, so that its K and V stay
// in the cache, and long block rows come before short ones, so that the threads end together.
#include "forward.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "parallel.h"

namespace bsa {

namespace {

// Rows before a request's first key are no task's: they are zeros here.
void clear_unseen_rows(const Problem& p) {
  const int64_t size = p.dtype == Dtype::f32 ? 4 : 2;
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t rows = p.requests[b].first_row;
    std::fill_n(static_cast<char*>(p.out) + b * p.Lq * p.Hq * p.Dv * size,
                rows * p.Hq * p.Dv * size, char(0));
    for (int64_t h = 0; h < p.Hq; ++h)
      std::fill_n(p.lse + (b * p.Hq + h) * p.Lq, rows, -__builtin_inff());
  }
}

// How far a key/value head has come in decoding.
struct Head {
  std::atomic<int64_t> scored{0}, weighed{0};
  std::atomic<bool> seeded{false}, decided{false};
};

// Whether prefill may use the int8 copy of K. The budget and the certificate need exact maxima, a
// softcap other units.
bool may_filter(const Problem& p, const Level& level) {
  return level.filters[int(p.dtype)] && p.any_rule && !p.budget.data && !p.dropped &&
         p.softcap == 0 && p.scale > 0 && p.Lq * p.G >= 512;
}

// Whether decode may use the caller's int8 copy of K: as in prefill; and where the walk does not
// begin with a seed, nothing is known beforehand to compare with. Short caches are not worth it.
bool may_filter_decode(const Problem& p, int64_t keys) {
  return p.int8.data && p.any_rule && !p.budget.data && !p.dropped && p.softcap == 0 &&
         p.scale > 0 && p.order == kSinkDiagonal && keys > kDecodeRegion;
}

void make_room_for_planes(Problem& p, Workspace& workspace) {
  const int64_t heads = p.B * p.Hkv;
  KeyPlanes& k = p.planes;
  k.chunks = (p.Lk + kLanes - 1) / kLanes, k.width = (p.D + 3) / 4 * 4;
  const int64_t chunks = heads * k.chunks, keys = chunks * kLanes;
  char* at = workspace.get(keys * (k.width + 4) + chunks * 13 + heads * (p.D * 4 + 5) + 7 * 64);
  const auto take = [&](int64_t bytes) {
    char* const start = at;
    at += (bytes + 63) / 64 * 64;
    return start;
  };
  k.data = reinterpret_cast<int8_t*>(take(keys * k.width));
  k.sums = reinterpret_cast<int32_t*>(take(keys * 4));
  k.chunk = reinterpret_cast<ChunkBounds*>(take(chunks * 12));
  k.mean = reinterpret_cast<float*>(take(heads * p.D * 4));
  k.mean_norm = reinterpret_cast<float*>(take(heads * 4));
  k.chunk_state = reinterpret_cast<uint8_t*>(take(chunks));
  k.head_state = reinterpret_cast<uint8_t*>(take(heads));
  std::fill_n(k.chunk_state, chunks, uint8_t(0));
  std::fill_n(k.head_state, heads, uint8_t(0));
}

// Block rows that walk side by side read K and V once for all of them: worth it where they do not
// stay in the cache that the cores share (measured from 16 MB on: 1.15 times as fast at 16K tokens
// with D=128, 1.43 times at 64K with D=64; a little slower below), and where there are enough teams
// to keep all threads busy to the end.
int64_t team_of(const Problem& p) {
  const int64_t seen = p.window && p.window < p.Lk ? p.window : p.Lk;
  const int64_t bytes = seen * (p.D + p.Dv) * (p.dtype == Dtype::f32 ? 4 : 2);
  const int64_t rows = p.B * p.Hq * p.NQ, threads = torch::stable::get_num_threads();
  const int64_t fair = rows / (16 * threads);
  return bytes < (int64_t(12) << 20) || fair < 1 ? 1 : std::min<int64_t>(fair, kTeam);
}

}  // namespace

void run_prefill(Problem& p, const Level& level) {
  const int type = int(p.dtype);
  static thread_local Workspace workspace;
  if (may_filter(p, level)) make_room_for_planes(p, workspace);
  p.team = team_of(p);
  const size_t scratch = level.scratch_bytes(p);
  std::vector<float> k_max;
  if (p.any_rule) {
    k_max.resize(p.B * p.Hkv);
    run_tasks(p.B * p.Hkv, 64,
              [&](int64_t i, char*) { k_max[i] = level.max_abs[type](p, i / p.Hkv, i % p.Hkv); });
    p.k_max = k_max.data();
  }
  clear_unseen_rows(p);
  const int64_t per_head = p.NQ * p.G, teams = (per_head + p.team - 1) / p.team;
  run_tasks(p.B * p.Hkv * teams, scratch, [&](int64_t i, char* memory) {
    const int64_t bh = i / teams, t = i % teams * p.team;
    level.prefill[type](p, bh / p.Hkv, bh % p.Hkv, t, std::min(t + p.team, per_head), memory);
  });
  workspace.trim(size_t(256) << 20);
}

void run_append(const NewKeys& keys, const Level& level) {
  const auto task = [&](int64_t bh, char*) { level.append_keys[int(keys.dtype)](keys, bh); };
  if (keys.n < 16) {  // one token's keys are written before a second thread is awake
    for (int64_t bh = 0; bh < keys.B * keys.Hkv; ++bh) task(bh, nullptr);
  } else {
    run_tasks(keys.B * keys.Hkv, 64, task);
  }
}

void run_decode(Problem& p, const Level& level) {
  const int type = int(p.dtype);
  const int64_t heads = p.B * p.Hkv;
  int64_t keys = 0;
  for (int64_t b = 0; b < p.B; ++b) keys = std::max(keys, p.requests[b].keys());
  p.rows = p.Lq * p.G;
  p.region = (kDecodeRegion + p.block_k - 1) / p.block_k * p.block_k;
  p.regions = std::max<int64_t>((keys + p.region - 1) / p.region, 1);
  p.score_stride = (keys + 63) / 64 * 64 + 64;  // vectors may read past the end

  // One workspace for what the passes hand on.
  size_t bytes = 0;
  const auto reserve = [&](size_t size) {
    const size_t at = bytes;
    bytes += (size + 63) / 64 * 64;
    return at;
  };
  const size_t scores = reserve(heads * p.rows * p.score_stride * 4);
  const size_t block_max = reserve(p.block_k > 1 ? heads * p.rows * p.NK * 4 : 0);
  const size_t fate = reserve(heads * p.Lq * p.NK);
  const size_t row_max = reserve(heads * p.rows * 4);
  const size_t row_c = reserve(heads * p.rows * 4);
  const size_t partial = reserve(heads * p.regions * p.rows * partial_width(p) * 4);
  const bool filters = may_filter_decode(p, keys);
  const size_t filter_rows = reserve(filters ? heads * p.rows * sizeof(FilterRow) : 0);
  const size_t filter_q = reserve(filters ? heads * p.rows * p.int8.width * 2 : 0);
  const size_t filter_state = reserve(filters ? heads * 8 : 0);
  static thread_local Workspace workspace;
  char* const memory = workspace.get(bytes);
  if (filters) {
    p.filter_rows = reinterpret_cast<FilterRow*>(memory + filter_rows);
    p.filter_q = reinterpret_cast<int32_t*>(memory + filter_q);
    p.filter_state = reinterpret_cast<int32_t*>(memory + filter_state);
    std::fill_n(p.filter_state, heads * 2, 0);
  }
  p.scores = reinterpret_cast<float*>(memory + scores);
  p.block_max = reinterpret_cast<float*>(memory + block_max);
  p.fate = reinterpret_cast<uint8_t*>(memory + fate);
  p.row_max = reinterpret_cast<float*>(memory + row_max);
  p.row_c = reinterpret_cast<float*>(memory + row_c);
  p.partial = reinterpret_cast<float*>(memory + partial);

  // One parallel loop: a barrier between the passes would cost as much as a short pass itself, and
  // far more where the cores are shared. Whoever finishes the last region of a head goes on with
  // what needs all of them. No one waits for a task that has not begun, as tasks are begun in
  // order.
  std::unique_ptr<Head[]> states(new Head[heads]);
  const int64_t half = heads * p.regions, seeds = filters ? heads : 0;
  run_tasks(seeds + 2 * half, level.scratch_bytes(p), [&](int64_t i, char* memory) {
    if (i < seeds) {
      level.decode_seed[type](p, i, memory);
      states[i].seeded.store(true);
      return;
    }
    i -= seeds;
    const int64_t bh = i % half / p.regions, region = i % p.regions;
    Head& head = states[bh];
    if (i < half) {
      while (filters && !head.seeded.load()) std::this_thread::yield();
      level.decode_scores[type](p, bh, region, memory);
      if (head.scored.fetch_add(1) + 1 == p.regions) {
        for (int64_t t = 0; t < p.Lq; ++t) level.decode_decide(p, bh, t, memory);
        head.decided.store(true);
      }
      return;
    }
    while (!head.decided.load()) std::this_thread::yield();
    level.decode_values[type](p, bh, region, memory);
    if (head.weighed.fetch_add(1) + 1 == p.regions) level.decode_finish[type](p, bh);
  });
  workspace.trim(size_t(256) << 20);
}

}  // namespace bsa
