// The instances for one element type: they compile side by side.
#include "launch.cuh"

namespace bsa::cuda::sm90 {

void prefill_f16(const Params& p, void* stream, float expected_sparsity) {
  choose_sizes<Float16>(p, stream, expected_sparsity);
}

}  // namespace bsa::cuda::sm90
