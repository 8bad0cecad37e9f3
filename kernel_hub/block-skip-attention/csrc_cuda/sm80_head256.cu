// The kernels of sm_80 for head sizes up to 256, and 256 of the values.
#include "launch_sm80.cuh"

template struct bsa::cuda::Launch<256, 256>;
