// The instances for one element type: they compile side by side.
#if !defined(BSA_EMULATE)  // there, tests compile what they need
#include "decode_launch.cuh"

namespace bsa::cuda::sm90 {

void decode_bf16(const Params& p, void* stream, float expected_sparsity, int processors) {
  choose_decode<cuda::BFloat16>(p, stream, expected_sparsity, processors);
}

}  // namespace bsa::cuda::sm90

#endif
