// The sm_90a kernels as functions of a shared library that needs no GPU: for tests.
#include "decode_sm80.cuh"
#include "prove.cuh"
#include "requests.cuh"
#include "sm90/decode_launch.cuh"
#include "sm90/launch.cuh"
#include "start.h"

using namespace bsa::cuda;

namespace {

std::string failure;

template <class T, int kD, int kDv, int kBlockK>
void choose(const Params& p, const std::string& version) {
  if (version == "general")
    return sm90::launch<sm90::Config<T, kD, kDv, kBlockK, true, false, true>>(p, nullptr);
  if (version == "always")
    return sm90::launch<sm90::Config<T, kD, kDv, kBlockK, true, false, false>>(p, nullptr);
  using OnDemand = sm90::Config<T, kD, kDv, kBlockK, true, true, false>;
  if constexpr (OnDemand::kFits)
    if (version == "demand") return sm90::launch<OnDemand>(p, nullptr);
  if constexpr (kD <= 128 && kBlockK == 128)
    if (version == "dense")
      return sm90::launch<sm90::Config<T, kD, kDv, kBlockK, false, false, false>>(p, nullptr);
  emulator::fail("no such version: " + version);
}

// Decode by the kernel of sm_80, or, with rings, of sm_90a.
template <class T, int kD, int kDv, int kBlockK>
void run_decode(const Params& p, const sm90::Rings* rings) {
  Params with_seen = p;
  std::vector<int32_t> seen(p.B * p.Lq);
  if (p.valid) {
    start(count_splits_kernel<kBlockK>, dim3(p.Lq, p.B), kThreads, 0, nullptr, p, seen.data());
    with_seen.splits_seen = seen.data();
  }
  std::vector<int32_t> open;
  if (p.int8_keys.data) {
    open.resize(size_t(p.B) * p.Hkv * p.Lq * p.splits * (1 + p.split_blocks), -1);
    with_seen.open_blocks = open.data();
    start(prove_kernel<T, kD>, dim3(p.splits, p.Lq * p.Hkv, p.B), kThreads, 0, nullptr, with_seen);
  }
  if (rings) {
    sm90::launch_decode<sm90::Decode<T, kD, kDv, kBlockK>>(with_seen, nullptr, *rings);
  } else {
    using C = Decode<T, kD, kDv, kBlockK>;
    start(decode_kernel<C>, dim3(p.splits, p.Lq * p.Hkv, p.B), kThreads, C::kSharedBytes, nullptr,
          with_seen);
  }
  start(join_kernel<T>, dim3(p.Lq * p.Hq, p.B), kThreads, 0, nullptr, with_seen);
}

template <class Run>
const char* caught(Run run) {
  try {
    run();
    return nullptr;
  } catch (const std::exception& error) {
    failure = error.what();
    return failure.c_str();
  }
}

}  // namespace

extern "C" size_t params_bytes() { return sizeof(Params); }

// Null, or what went wrong.
extern "C" const char* prefill(const Params* p, const char* version) {
  return caught([&] {
    const bool bfloat16 = p->dtype == kBFloat16;
    if (!bfloat16 && p->D == 64 && p->Dv == 64 && p->block_k == 64)
      choose<sm90::Float16, 64, 64, 64>(*p, version);
    else if (!bfloat16 && p->D == 64 && p->Dv == 64)
      choose<sm90::Float16, 64, 64, 128>(*p, version);
    else if (bfloat16 && p->D == 128 && p->Dv == 128 && p->block_k == 128)
      choose<sm90::BFloat16, 128, 128, 128>(*p, version);
    else if (bfloat16 && p->D == 256 && p->Dv == 256 && p->block_k == 64)
      choose<sm90::BFloat16, 256, 256, 64>(*p, version);
    else if (bfloat16 && p->D == 192 && p->Dv == 128 && p->block_k == 64)
      choose<sm90::BFloat16, 192, 128, 64>(*p, version);
    else if (bfloat16 && p->D == 192 && p->Dv == 128 && p->block_k == 128)
      choose<sm90::BFloat16, 192, 128, 128>(*p, version);
    else
      emulator::fail("not compiled for these sizes");
  });
}

// `rings` is null for the kernel of sm_80.
extern "C" const char* decode(const Params* p, const sm90::Rings* rings) {
  return caught([&] {
    const bool bfloat16 = p->dtype == kBFloat16;
    if (!bfloat16 && p->D <= 64 && p->Dv <= 64 && p->block_k == 64)
      run_decode<Float16, 64, 64, 64>(*p, rings);
    else if (!bfloat16 && p->D <= 64 && p->Dv <= 64)
      run_decode<Float16, 64, 64, 128>(*p, rings);
    else if (bfloat16 && p->D <= 128 && p->Dv <= 128 && p->block_k == 64)
      run_decode<BFloat16, 128, 128, 64>(*p, rings);
    else if (bfloat16 && p->D <= 192 && p->Dv <= 128 && p->block_k == 64)
      run_decode<BFloat16, 192, 128, 64>(*p, rings);
    else if (bfloat16 && p->D <= 192 && p->Dv <= 128)
      run_decode<BFloat16, 192, 128, 128>(*p, rings);
    else if (bfloat16 && p->block_k == 64)
      run_decode<BFloat16, 256, 256, 64>(*p, rings);
    else
      emulator::fail("not compiled for these sizes");
  });
}

// Which version of prefill runs a call: dense, always, demand, general; and of decode, how many of
// two blocks before the first are taken for skipped.
extern "C" int32_t version(const Params* p, float expected_sparsity) {
  return int32_t(sm90::version_for(*p, true, expected_sparsity));
}
extern "C" float skipped_before(const Params* p, float expected_sparsity) {
  using C = sm90::Decode<Float16, 64, 64, 64>;
  return sm90::rings_of<C>(*p, expected_sparsity, 132).skipped_before;
}
