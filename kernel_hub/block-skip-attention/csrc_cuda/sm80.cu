// Which kernel of sm_80 serves a call, and the small kernels that all calls share.
#include "launch_sm80.cuh"
#include "requests.cuh"

namespace bsa::cuda {

extern template struct Launch<64, 64>;
extern template struct Launch<128, 128>;
extern template struct Launch<192, 128>;
extern template struct Launch<256, 256>;

namespace {

// What decode takes with blocks of 128 keys at head sizes 192 and 128; prefill takes less.
constexpr int kSharedBytesOfWide = Decode<BFloat16, 192, 128, 128>::kSharedBytes;

// Calls `run` with the smallest pair of head sizes that p fits into.
template <class Run>
void with_sizes(const Params& p, Run run) {
  if (p.D <= 64 && p.Dv <= 64) return run(Launch<64, 64>());
  if (p.D <= 128 && p.Dv <= 128) return run(Launch<128, 128>());
  if (p.D <= 192 && p.Dv <= 128) return run(Launch<192, 128>());
  run(Launch<256, 256>());
}

}  // namespace

const char* refusal_sm80(const Params& p, const Device& device) {
  if (p.D > 256 || p.Dv > 256) return "expected head sizes up to 256";
  if (p.D % 8 || p.Dv % 8) return "expected head sizes that are multiples of 8";
  if (p.block_k != 64 && p.block_k != 128) return "block_k: expected 64 or 128";
  if (p.block_k == 128 && (p.D > 192 || p.Dv > 128))
    return "block_k: expected 64 at head sizes above 192, and 128 of V";
  if (p.block_k == 128 && p.D > 128 && device.shared_bytes < kSharedBytesOfWide)
    return "block_k: expected 64 at head sizes above 128 on this GPU, for want of shared memory";
  if (p.decode() && p.group > kMaxGroup)
    return "decode: expected at most 16 query heads to a key/value head";
  if (!p.decode() && p.block_q != 64) return "block_q: expected 64";
  return nullptr;
}

void prefill_sm80(const Params& p, Stream stream) {
  with_sizes(p, [&](auto launch) { launch.prefill(p, stream); });
}

void decode_sm80(const Params& p, Stream stream) {
  with_sizes(p, [&](auto launch) { launch.decode(p, stream); });
}

void join_splits(const Params& p, Stream stream) {
  const auto kernel = p.dtype == kBFloat16 ? join_kernel<BFloat16> : join_kernel<Float16>;
  start(kernel, dim3(p.Lq * p.Hq, p.B), kThreads, 0, stream, p);
}

void make_requests(const Params& p, const int64_t* q_offset, bool one_offset, Request* requests,
                   Stream stream) {
  start(requests_kernel, dim3(p.B), kThreads, 0, stream, p, q_offset, one_offset ? 0 : 1, requests);
}

void count_splits(const Params& p, int32_t* found, Stream stream) {
  const auto kernel = p.block_k == 128 ? count_splits_kernel<128> : count_splits_kernel<64>;
  start(kernel, dim3(p.Lq, p.B), kThreads, 0, stream, p, found);
}

Device current_device() {
  Device device;
#if defined(BSA_EMULATE)
  device.capability = 80, device.shared_bytes = 163 << 10, device.processors = 108;
#else
  int index = 0, major = 0, minor = 0;
  check(cudaGetDevice(&index));
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
  check(
      cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  check(cudaDeviceGetAttribute(&device.processors, cudaDevAttrMultiProcessorCount, index));
  device.capability = 10 * major + minor;
#endif
  return device;
}

}  // namespace bsa::cuda
