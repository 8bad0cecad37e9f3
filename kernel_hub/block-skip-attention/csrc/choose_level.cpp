// Which level runs: the best that the machine has, or the one that HF_SPARSE_ATTENTION_CPU_LEVEL
// names if the machine has it. The variable is read at every call, so that one process can compare
// levels.
#include <cstdlib>
#include <cstring>

#include "problem.h"

namespace bsa {

const Level* choose_level(const char** wanted) {
  const char* const name = std::getenv("HF_SPARSE_ATTENTION_CPU_LEVEL");
  *wanted = name ? name : "";
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
  const struct {
    const Level* level;
    bool here;
  } known[] = {{&kAvx512Bf16, bf16}, {&kAvx512, avx512}, {&kAvx2, avx2}, {&kPortable, true}};
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
