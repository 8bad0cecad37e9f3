// What the binding calls. Needs nothing of Hopper, so any unit may include it.
#pragma once
#include "../params.h"

namespace bsa::cuda {

// Why the Hopper kernel does not serve `p`, or null. What it refuses, the sm_80 kernels take.
const char* refusal_sm90(const Params& p);

// Computes `p` on `stream`, a cudaStream_t. `expected_sparsity` is how much of the blocks such
// calls were seen to skip, or 0 if nobody knows: it changes no result, only how V is fetched. Waits
// for nothing, allocates nothing, and depends on no value in device memory, so it can be captured
// in a CUDA graph. Throws std::runtime_error if CUDA will not start it.
void prefill_sm90(const Params& p, void* stream, float expected_sparsity);

}  // namespace bsa::cuda
