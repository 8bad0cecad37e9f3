// The sm_90a prefill kernel as a function of a shared library that needs no GPU: for tests.
#include "sm90/launch.cuh"

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

}  // namespace

extern "C" size_t params_bytes() { return sizeof(Params); }

// Null, or what went wrong.
extern "C" const char* prefill(const Params* p, const char* version) {
  try {
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
    return nullptr;
  } catch (const std::exception& error) {
    failure = error.what();
    return failure.c_str();
  }
}
