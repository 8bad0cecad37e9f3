// Which level runs: the best that the machine has, or the one that HF_SPARSE_ATTENTION_CPU_LEVEL
// names if the machine has it. The variable is read at every call, so that one process can compare
// levels. AMX is only taken where it is named: so far it has run on emulated tiles alone.
#include <cstdlib>
#include <cstring>

#include "problem.h"
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "amx_support.h"
#endif

namespace bsa {

#if defined(__x86_64__)
namespace {

// Of the processor and the operating system together; asked of Linux only where both have it.
const char* amx_refusal_here(bool has_avx512) {
  AmxFacts facts;
  uint32_t unused, other;
  __get_cpuid_count(7, 0, &unused, &unused, &unused, &facts.features);
  __get_cpuid_count(0x1d, 1, &unused, &facts.rows_bytes, &facts.rows, &other);
  if (has_avx512) {  // hence the instruction that reads XCR0
    uint32_t low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    facts.saved = low | uint64_t(high) << 32;
  }
  facts.ask = [] {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  };
  return amx_refusal(facts);
}

}  // namespace
#endif

const Level* choose_level(const char** wanted, const char** refusal) {
  const char* const name = std::getenv("HF_SPARSE_ATTENTION_CPU_LEVEL");
  *wanted = name ? name : "";
  *refusal = nullptr;
#if defined(__x86_64__)
  // Also asks the operating system whether it saves the wide registers.
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                           __builtin_cpu_supports("f16c");
  static const bool avx512 =
      avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2");
  static const bool bf16 =
      avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  static const Level amx = with_amx(kAvx512Bf16);
  const bool asks_for_amx = std::strcmp(*wanted, amx.name) == 0;
  if (asks_for_amx) {
    static const char* const no_amx = amx_refusal_here(avx512);
    *refusal = no_amx;
  }
  const struct {
    const Level* level;
    bool here;
  } known[] = {{&amx, asks_for_amx && bf16 && !*refusal},
               {&kAvx512Bf16, bf16},
               {&kAvx512, avx512},
               {&kAvx2, avx2},
               {&kPortable, true}};
#else
  const struct {
    const Level* level;
    bool here;
  } known[] = {{&kPortable, true}};
#endif
  for (const auto& candidate : known)
    if (candidate.here && (!name || !*name || std::strcmp(name, candidate.level->name) == 0))
      return candidate.level;
  return nullptr;
}

}  // namespace bsa
