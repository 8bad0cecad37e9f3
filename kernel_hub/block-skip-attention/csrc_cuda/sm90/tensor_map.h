// Tensor maps: how the copy engine finds a box of a [batch, head, row, x] tensor.
//
// The driver makes them. Its function is asked for at run time, so that the library needs no
// libcuda to be loaded: where there is no driver, it still registers its ops and says why it cannot
// run them.
#pragma once
#include <stdexcept>
#include <string>

#include "instructions.h"
#include "panels.h"
#if !defined(BSA_EMULATE)
#include <cuda_runtime.h>
#endif

namespace bsa::cuda::sm90 {

[[noreturn]] inline void refuse(const std::string& why) {
  throw std::runtime_error("block_skip_attention (CUDA, sm_90a): " + why);
}

#if defined(BSA_EMULATE)

inline TensorMap make_map(const Strided& x, int, int batches, int heads, int rows, int width,
                          int box_rows, const void*) {
  return {static_cast<const char*>(x.data),
          rows,
          heads,
          batches,
          width,
          x.row * 2,
          x.head * 2,
          x.batch * 2,
          box_rows};
}

#else

inline void check(cudaError_t error) {
  if (error != cudaSuccess) refuse(cudaGetErrorString(error));
}

inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                           cudaEnableDefault, &result));
    if (result != cudaDriverEntryPointSuccess) refuse("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return found;
}

// The map of `x` [batches, heads, rows, width], in boxes of `box_rows` rows of a panel.
inline TensorMap make_map(const Strided& x, int dtype, int batches, int heads, int rows, int width,
                          int box_rows, const void* if_empty) {
  const cuuint64_t sizes[] = {cuuint64_t(width), cuuint64_t(rows > 0 ? rows : 1), cuuint64_t(heads),
                              cuuint64_t(batches)};
  // Where there is one row, head or batch, torch may report any stride, 0 too. None is used then.
  const int64_t elements[] = {x.row, x.head, x.batch};
  cuuint64_t strides[3];
  for (int i = 0; i < 3; ++i) strides[i] = cuuint64_t(sizes[i + 1] > 1 ? elements[i] : width) * 2;
  const cuuint32_t box[] = {kPanel, cuuint32_t(box_rows), 1, 1}, steps[] = {1, 1, 1, 1};
  void* data = const_cast<void*>(x.data ? x.data : if_empty);  // no box of an empty tensor is read
  TensorMap map;
  const CUresult result = tensor_map_encoder()(
      &map, dtype == kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      4, data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    refuse("the driver makes no tensor map of these strides, error " + std::to_string(result));
  return map;
}

#endif

}  // namespace bsa::cuda::sm90
