// Starting a kernel: on the GPU, or in the emulator.
#pragma once
#include <stdexcept>
#include <string>

#include "launch.h"
#include "ptx_sm80.cuh"

namespace bsa::cuda {

#if defined(BSA_EMULATE)

// `First` is Params, or what else a kernel is about.
template <class First, class... Rest>
void start(void (*kernel)(First, Rest...), dim3 grid, int threads, int shared_bytes, Stream,
           const First& p, Rest... rest) {
  emulator::run(grid, dim3(threads), shared_bytes, [&] { kernel(p, rest...); });
}

#else

inline void check(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("block_skip_attention (CUDA): ") +
                             cudaGetErrorString(error));
}

template <class First, class... Rest>
void start(void (*kernel)(First, Rest...), dim3 grid, int threads, int shared_bytes, Stream stream,
           const First& p, Rest... rest) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 48 << 10)
    check(
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  void* arguments[] = {const_cast<First*>(&p), &rest...};
  check(cudaLaunchKernel(function, grid, dim3(threads), arguments, shared_bytes,
                         static_cast<cudaStream_t>(stream)));
}

#endif

}  // namespace bsa::cuda
