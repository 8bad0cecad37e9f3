// What one launch gets: an attention call in plain pointers and sizes, the same for all kernels.
//
// Everything that may differ from call to call without a new CUDA graph (thresholds, which keys are
// valid, where queries stand) is read from device memory; nothing here depends on such a value. The
// binding fills it (forward_cuda.cpp), the sm_80 and sm_90a kernels read it, and so does the
// emulator of the tests, which compiles the same kernels for the CPU.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define BSA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define BSA_HOST_DEVICE inline
#endif

namespace bsa::cuda {

constexpr int kDecodeMaxQueries = 8;  // see `phase` in hf_sparse_attention/types.py
constexpr int kMaxGroup = 16;         // decode: heads of a group are the rows of one product

enum Dtype : int32_t { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2 };  // the last one to append only
enum Order : int32_t { kAscending = 0, kSinkDiagonal = 1, kDescending = 2 };

// A [batch, head, row, x] tensor; strides in elements. x is contiguous, and the address and all
// strides are multiples of 16 bytes.
struct Strided {
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};

// A float tensor [B|1, Hq|1, NQ|1] of a skip rule, in device memory: dimensions of size 1 have
// stride 0. Null: no such rule.
struct RuleTensor {
  const float* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
  BSA_HOST_DEVICE float at(int64_t b, int64_t h, int64_t i) const {
    return data[b * batch + h * head + i * row];
  }
};

// One batch item without its padding; keys and columns are counted from `first`. Made on the
// device, see requests.cuh; without one, all keys are valid and the last query sees the last.
struct Request {
  int32_t first = 0, keys = 0;
  int32_t offset = 0;  // the column of query row 0
  int32_t unused = 0;
};

// The int8 copy of K that a caller keeps beside a cache: uint8 [heads, 1 + chunks, 64 * (width +
// 12)], see int8_keys.cuh. Null: none.
struct Int8Keys {
  uint8_t* data = nullptr;
  int32_t chunks = 0, width = 0;  // width: the head size, rounded up to whole words
  BSA_HOST_DEVICE int64_t chunk_bytes() const { return 64 * (int64_t(width) + 12); }
  BSA_HOST_DEVICE uint8_t* head(int64_t i) const { return data + i * (1 + chunks) * chunk_bytes(); }
  BSA_HOST_DEVICE uint8_t* chunk(int64_t i, int j) const {
    return head(i) + (1 + j) * chunk_bytes();
  }
};

// New keys [B, Hkv, n, D], to stand at *position and behind.
struct NewKeys {
  Strided k;  // any strides, but x is contiguous
  int32_t dtype = kBFloat16;
  int32_t B = 0, Hkv = 0, n = 0, D = 0;
  const int64_t* position = nullptr;  // in device memory
  Int8Keys copy;
};

constexpr int kKeysAtOnce = 64;  // new keys of one block of threads

struct Params {
  Strided q, k, v;
  int32_t dtype = kBFloat16;
  int32_t B = 0, Hq = 0, Hkv = 0, group = 1, Lq = 0, Lk = 0, D = 0, Dv = 0;
  int32_t block_q = 64, block_k = 64;
  int32_t NQ = 0, NK = 0;  // block rows (decode: Lq) and key blocks, as the results count them

  float scale = 1.0f, softcap = 0.0f;  // softcap 0: none
  int32_t causal = 1;
  int32_t window = 0;  // 0: none
  int32_t order = kSinkDiagonal;
  int32_t keep_sink = 1;  // with a threshold, never skip block 0

  RuleTensor log_lambda, threshold, budget;
  const float* sinks = nullptr;       // [Hq], or null
  const uint8_t* valid = nullptr;     // [B, Lk], or null: all
  const Request* requests = nullptr;  // [B], or null

  // Results. Zeroed beforehand: counts, skips. Every other element is written by the kernels.
  void* out = nullptr;                   // [B, Lq, Hq, Dv]
  float* lse = nullptr;                  // [B, Hq, Lq]
  unsigned long long* counts = nullptr;  // [B, Hq, 2]: visited, skipped
  uint8_t* skips = nullptr;              // [B, Hq | Hkv, NQ, skip_bytes], or null; 4-byte aligned
  float* dropped = nullptr;              // [B, Hq, Lq], or null
  int32_t skip_bytes = 0;

  // Decode: the keys are cut into `splits` runs of `split_blocks` blocks, which are joined later.
  int32_t splits = 1, split_blocks = 1;
  const int32_t* splits_seen = nullptr;  // [B, Lq]: splits with a block to visit; null: no holes
  float* partial_out = nullptr;          // [B, Hq, Lq, splits, Dv], in units of exp(m)
  float* partial_sums = nullptr;         // [B, Hq, Lq, splits, 4]: m, l, top, c
  // With an int8 copy of K, which of a split's blocks are not proved to be skipped: their number,
  // and then they, [B, Hkv, Lq, splits, 1 + split_blocks]. Null: any may be visited.
  Int8Keys int8_keys;
  int32_t* open_blocks = nullptr;

  BSA_HOST_DEVICE bool decode() const { return Lq <= kDecodeMaxQueries && Lk > Lq; }
  BSA_HOST_DEVICE bool wants_dropped() const {
    return dropped != nullptr || budget.data != nullptr;
  }
};

}  // namespace bsa::cuda
