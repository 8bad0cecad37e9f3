// What the binding calls. Needs nothing of Hopper, so any unit may include it.
#pragma once
#include "../params.h"

namespace bsa::cuda {

// Why the Hopper kernel for a prefill, or a decode, does not serve `p`, or null. What it refuses,
// the sm_80 kernels take.
const char* refusal_prefill_sm90(const Params& p);
const char* refusal_decode_sm90(const Params& p);

// What share of the blocks a call is expected to skip: what the variable
// HF_SPARSE_ATTENTION_EXPECTED_SPARSITY says, else what the caller does. It changes no result, only
// how V is fetched.
float expected_or_told(double expected_sparsity);

// Each computes `p` on `stream`, a cudaStream_t; decode, as far as its splits. It waits for
// nothing, allocates nothing, and depends on no value in device memory, so it can be captured in a
// CUDA graph. Throws std::runtime_error if CUDA will not start it. `processors`: multiprocessors.
void prefill_sm90(const Params& p, void* stream, float expected_sparsity);
void decode_sm90(const Params& p, void* stream, float expected_sparsity, int processors);

}  // namespace bsa::cuda
