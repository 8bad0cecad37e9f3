// What one attention call is, in plain pointers and 64-bit sizes, and the table of functions that
// one instruction-set level offers for it.
//
// The idea of the split: everything that decides *what* is computed (shapes, requests, tasks) is
// compiled once, for any machine; everything that is hot is a template compiled once a level, each
// time with other -m flags and in a namespace of its own, and reached through `Level`. Only this
// header and types without inline functions cross that border, so that the linker can never pick an
// AVX-512 copy of a shared inline function for an older machine.
#pragma once
#include <cstddef>
#include <cstdint>

// Never a function of its own that the linker could share between levels.
#define BSA_PLAIN __attribute__((always_inline)) inline

namespace bsa {

constexpr int kLanes = 64;  // query rows that one prefill task holds side by side in vector lanes
// Long inputs: so many block rows of prefill walk the keys side by side, so many keys at a time.
constexpr int kTeam = 8, kStride = 256;
constexpr int kDecodeMaxQueries = 8;  // see `phase` in hf_sparse_attention/types.py
constexpr int kDecodeRegion = 512;    // keys that one decode task reads, rounded up to whole blocks

enum class Dtype { f32, bf16, f16 };
enum Order { kAscending = 0, kSinkDiagonal = 1, kDescending = 2 };

// A [batch, head, row, x] tensor whose x is contiguous; strides in elements.
struct Strided {
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};

// A float tensor [B|1, Hq|1, NQ|1] of a skip rule: dimensions of size 1 have stride 0. Null: no
// such rule.
struct RuleTensor {
  const float* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
  BSA_PLAIN float at(int64_t b, int64_t h, int64_t i) const {
    return data[b * batch + h * head + i * row];
  }
};

// One batch item without its padding: keys [first, end), counted from `first` wherever a key is
// named below.
struct Request {
  int64_t first = 0, end = 0;
  int64_t offset = 0;               // column of query row 0, counted from `first`
  int64_t first_row = 0;            // the first query row that may see a key
  int64_t end_row = 0;              // the row after the last valid key: right padding begins
  const uint8_t* valid = nullptr;   // null: no holes; else [keys]
  const int32_t* before = nullptr;  // with holes: valid keys before key c, [keys + 1]
  BSA_PLAIN int64_t keys() const { return end - first; }
  // How many valid keys lie in [lo, hi).
  BSA_PLAIN int64_t count(int64_t lo, int64_t hi) const {
    if (lo >= hi) return 0;
    return before ? before[hi] - before[lo] : hi - lo;
  }
};

// A chunk of 64 keys in the int8 copy of K: its scale, and bounds on the norms of its keys' copies
// (`plane`) and of what the copies miss (`rest`).
struct ChunkBounds {
  float alpha, plane_norm, rest_norm;
};

// The int8 copy of K that the filter of prefill reads: see key_planes.h. Null: no filter.
struct KeyPlanes {
  int64_t chunks = 0, width = 0;  // width: the head size, rounded up to whole groups of four
  int8_t* data = nullptr;         // [B * Hkv, chunks, 64, width]
  int32_t* sums = nullptr;        // [B * Hkv, chunks, 64]: -128 times the sum of a key's copy
  ChunkBounds* chunk = nullptr;   // [B * Hkv, chunks]
  float* mean = nullptr;          // [B * Hkv, D]
  float* mean_norm = nullptr;     // [B * Hkv]
  // 0 not made, 1 being made, 2 made: chunks and means are made by the first task that wants them.
  uint8_t *chunk_state = nullptr, *head_state = nullptr;
};

// The int8 copy of K that is kept beside a cache, for decode: see int8_keys.h. All zeros: an empty
// copy.
struct Int8Keys {
  uint8_t* data = nullptr;  // [B * Hkv, 1 + chunks, chunk_bytes]; null: none
  int64_t chunks = 0, width = 0;
  Int8Keys() = default;
  Int8Keys(uint8_t* data_, int64_t chunks_, int64_t D)
      : data(data_), chunks(chunks_), width((D + 3) / 4 * 4) {}
  // A chunk: the bytes of 64 keys, then three floats a key.
  BSA_PLAIN static int64_t chunk_bytes(int64_t D) { return kLanes * ((D + 3) / 4 * 4 + 12); }
  BSA_PLAIN uint8_t* head(int64_t bh) const {
    return data + bh * (1 + chunks) * kLanes * (width + 12);
  }
  BSA_PLAIN uint8_t* chunk(int64_t bh, int64_t i) const {
    return head(bh) + (1 + i) * kLanes * (width + 12);
  }
};

// New keys [B, Hkv, n, D] for an int8 copy, to stand at `start` and behind.
struct NewKeys {
  Strided k;
  Dtype dtype = Dtype::f32;
  int64_t B = 0, Hkv = 0, n = 0, D = 0, start = 0;
  Int8Keys copy;
};

// q or k [B, H, L, D] to be rotated in place: see rotate.h. cos and sin are [B|1, L, D].
struct Rotate {
  Strided x, cos, sin;
  int64_t H = 0, L = 0, D = 0;
  const float* norm = nullptr;  // [H|1, D], the weights of an RMSNorm; null: none
  int64_t norm_stride = 0;
  float eps = 0.0f;
};

// A query row of decode as the filter wants it, see decode_filter.h.
struct FilterRow {
  float unit, per_copied, per_rest, room;
  int32_t start;
};

struct Problem {
  Strided q, k, v;
  Dtype dtype = Dtype::f32;
  int64_t B = 0, Hq = 0, Hkv = 0, G = 1, Lq = 0, Lk = 0, D = 0, Dv = 0;
  float scale = 1.0f, softcap = 0.0f;  // softcap 0: none
  bool causal = true;
  int64_t window = 0;  // 0: none
  int64_t block_q = 64, block_k = 64, split_k = 1024;
  Order order = kSinkDiagonal;
  bool keep_sink = true;
  RuleTensor log_lambda, threshold, budget;
  bool any_rule = false;
  const float* sinks = nullptr;
  const Request* requests = nullptr;
  BSA_PLAIN bool decode() const { return Lq <= kDecodeMaxQueries && Lk > Lq; }

  void* out = nullptr;        // [B, Lq, Hq, Dv]
  float* lse = nullptr;       // [B, Hq, Lq]
  int64_t* counts = nullptr;  // [B, Hq, 2]
  uint8_t* skips = nullptr;   // [B, Hq | Hkv, NQ, skip_bytes], null if not wanted
  float* dropped = nullptr;   // [B, Hq, Lq], null if not wanted
  int64_t NQ = 0, NK = 0, skip_bytes = 0;

  float* k_max = nullptr;  // prefill: the largest |k| of each [B, Hkv], infinite if not finite
  KeyPlanes planes;
  int64_t team = 1;  // block rows of prefill that walk side by side, at most kTeam

  Int8Keys int8;  // decode: what the caller keeps beside K

  // Decode only: what its four passes hand to each other.
  int64_t region = kDecodeRegion, regions = 0, rows = 0, score_stride = 0;
  float* scores = nullptr;     // [B * Hkv, rows, score_stride]
  float* block_max = nullptr;  // [B * Hkv, rows, NK]
  uint8_t* fate = nullptr;     // [B * Hkv, Lq, NK]: 0 not visited, 1 kept, 2 skipped
  float* row_max = nullptr;    // [B * Hkv, rows]
  float* row_c = nullptr;      // [B * Hkv, rows]: log2 of the bound on what was dropped
  float* partial = nullptr;    // [B * Hkv, regions, rows, partial_width]: weighted values, and the
                               // sum of weights behind them
  // Null: no filter.
  FilterRow* filter_rows = nullptr;  // [B * Hkv, rows]
  int32_t* filter_q = nullptr;       // [B * Hkv, rows, 2 * width / 4]
  int32_t* filter_state = nullptr;   // [B * Hkv, 2]: see FilterTrust
};

// A whole number of cache lines, with room for the sum of the weights.
BSA_PLAIN int64_t partial_width(const Problem& p) { return p.Dv / 16 * 16 + 16; }

struct Backward;  // backward.h
struct Observe;   // observe.h

// The functions of one level, by element type (index: Dtype).
struct Level {
  const char* name;
  float (*max_abs[3])(const Problem&, int64_t b, int64_t kv_head);
  bool filters[3];  // whether prefill has its int8 filter
  void (*prefill[3])(const Problem&, int64_t b, int64_t kv_head, int64_t t0, int64_t t1,
                     char* scratch);
  void (*append_keys[3])(const NewKeys&, int64_t bh);
  void (*decode_seed[3])(const Problem&, int64_t bh, char* scratch);
  void (*decode_scores[3])(const Problem&, int64_t bh, int64_t region, char* scratch);
  void (*decode_decide)(const Problem&, int64_t bh, int64_t position, char* scratch);
  void (*decode_values[3])(const Problem&, int64_t bh, int64_t region, char* scratch);
  void (*decode_finish[3])(const Problem&, int64_t bh);
  size_t (*scratch_bytes)(const Problem&);
  void (*backward_row[3])(const Backward&, int64_t bh, int64_t task, char* scratch);
  void (*backward_key[3])(const Backward&, int64_t bh, int64_t key);
  size_t (*backward_scratch[3])(const Backward&);
  void (*observe[3])(const Problem&, const Observe&, int64_t kv_head, int64_t block_row,
                     char* scratch);
  size_t (*observe_bytes)(const Problem&, const Observe&);
  void (*rotate[3])(const Rotate&, int64_t from, int64_t to);
};

extern const Level kPortable;
#if defined(__x86_64__)
extern const Level kAvx2, kAvx512, kAvx512Bf16;
// Prefill in bfloat16 on AMX tiles, the one function in which the level avx512_amx differs.
void prefill_amx(const Problem&, int64_t b, int64_t kv_head, int64_t t0, int64_t t1, char* scratch);
#endif

// The best level that this machine and HF_SPARSE_ATTENTION_CPU_LEVEL allow. Null if the variable
// names none; then `wanted` is its value, and `refusal` why this machine has no such level, if
// there is more to say than that.
const Level* choose_level(const char** wanted, const char** refusal);

}  // namespace bsa
