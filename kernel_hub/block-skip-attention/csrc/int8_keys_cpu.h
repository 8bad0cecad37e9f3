// A tensor as an int8 copy of K.
#pragma once
#include "tensors.h"

namespace bsa {

// `copy` must have room for at least `least` keys.
Int8Keys int8_keys(const Tensor& copy, int64_t B, int64_t Hkv, int64_t D, int64_t least);

}  // namespace bsa
