// The kernels of sm_80 for head sizes up to 64, and 64 of the values.
#include "launch_sm80.cuh"

template struct bsa::cuda::Launch<64, 64>;
