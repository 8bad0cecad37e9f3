// What the binding may launch. Every function starts kernels on `stream` and returns at once; it
// throws std::runtime_error if CUDA will not start them.
#pragma once
#include "params.h"

namespace bsa::cuda {

using Stream = void*;

// The device that is current: 10 * major + minor of its compute capability, the largest shared
// memory of a thread block, and how many multiprocessors there are.
struct Device {
  int capability = 0, shared_bytes = 0, processors = 0;
};
Device current_device();

// Fills `requests` [B]; `q_offset` is [1] or [B], in device memory, or null.
void make_requests(const Params& p, const int64_t* q_offset, bool one_offset, Request* requests,
                   Stream stream);
// Fills `found` [B, Lq], see Params::splits_seen.
void count_splits(const Params& p, int32_t* found, Stream stream);

// Why the kernels of sm_80 do not serve a call of this shape on this device, or null.
const char* refusal_sm80(const Params& p, const Device& device);
void prefill_sm80(const Params& p, Stream stream);
void decode_sm80(const Params& p, Stream stream);  // fills partial_out and partial_sums
void join_splits(const Params& p, Stream stream);

// The int8 copy of K: enters keys; says whether it may help a decode; and, before one, fills
// open_blocks.
void append_int8_keys(const NewKeys& keys, Stream stream);
bool may_prove(const Params& p);
void prove_skips(const Params& p, Stream stream);

}  // namespace bsa::cuda
