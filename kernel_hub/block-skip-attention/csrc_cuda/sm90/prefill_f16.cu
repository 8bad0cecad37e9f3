// The instances for one element type: they compile side by side.
#if !defined(BSA_EMULATE)  // there, tests compile what they need
#include "launch.cuh"

namespace bsa::cuda::sm90 {

void prefill_f16(const Params& p, void* stream, float expected_sparsity) {
  choose_sizes<Float16>(p, stream, expected_sparsity);
}

}  // namespace bsa::cuda::sm90

#endif
