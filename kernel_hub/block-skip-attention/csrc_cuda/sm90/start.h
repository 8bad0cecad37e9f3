// Starting a kernel for Hopper: on the GPU, or in the emulator.
#pragma once
#include <type_traits>

#include "tensor_map.h"

namespace bsa::cuda::sm90 {

#if defined(BSA_EMULATE)

template <class... Arguments>
void start(void (*kernel)(Arguments...), dim3 grid, int threads, int bytes, void*,
           const std::type_identity_t<Arguments>&... arguments) {
  emulator::sm90::launch(grid, threads, bytes, [&] { kernel(arguments...); });
}

#else

template <class... Arguments>
void start(void (*kernel)(Arguments...), dim3 grid, int threads, int bytes, void* stream,
           const std::type_identity_t<Arguments>&... arguments) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  check(cudaLaunchKernel(function, grid, dim3(threads), pointers, bytes,
                         static_cast<cudaStream_t>(stream)));
}

#endif

}  // namespace bsa::cuda::sm90
