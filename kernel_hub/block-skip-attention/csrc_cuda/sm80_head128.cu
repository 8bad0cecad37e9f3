// The kernels of sm_80 for head sizes up to 128, and 128 of the values.
#include "launch_sm80.cuh"

template struct bsa::cuda::Launch<128, 128>;
