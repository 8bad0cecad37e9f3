"""The arithmetic peak of one core, measured: fused multiply-adds on registers and nothing else.

torch.mm is no measure of it: on some machines it reaches half of what the processor can do.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

SOURCE = r"""
#include <immintrin.h>
#define LOOP(type, step)                                                                     \
  type acc[12] = {};                                                                         \
  for (long i = 0; i < n; ++i)                                                               \
    for (int j = 0; j < 12; ++j) { acc[j] = step; __asm__ volatile("" : "+x"(acc[j])); }
#if defined(__AVX512F__)
#define FLOPS 32
void float32(long n) {
  __m512 x = _mm512_set1_ps(0.5f);
  __asm__ volatile("" : "+x"(x));
  LOOP(__m512, _mm512_fmadd_ps(x, x, acc[j]))
}
#else
#define FLOPS 16
void float32(long n) {
  __m256 x = _mm256_set1_ps(0.5f);
  __asm__ volatile("" : "+x"(x));
  LOOP(__m256, _mm256_fmadd_ps(x, x, acc[j]))
}
#endif
long float32_flops(void) { return 12 * FLOPS; }
#if defined(__AVX512BF16__)
void bfloat16(long n) {
  __m512i x = _mm512_set1_epi16(0x3f00);
  __asm__ volatile("" : "+x"(x));
  LOOP(__m512, _mm512_dpbf16_ps(acc[j], (__m512bh)x, (__m512bh)x))
}
long bfloat16_flops(void) { return 12 * 64; }
#endif
"""


def peaks(rounds: int = 9) -> dict[str, float] | str:
    """GFLOP/s of one thread by dtype, the best of some rounds; or why there is no number."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return "no compiler"
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "peak.c"), Path(folder, "peak.so")
        source.write_text(SOURCE)
        command = [compiler, "-x", "c", "-O3", "-march=native", "-funroll-loops", "-shared"]
        done = subprocess.run(
            [*command, "-fPIC", str(source), "-o", str(library)], capture_output=True, text=True
        )
        if done.returncode:
            return done.stderr.strip().splitlines()[-1]
        loops = ctypes.CDLL(str(library))
        found = {}
        for name in ("float32", "bfloat16"):
            if not hasattr(loops, name):
                continue
            n = 2_000_000
            work = n * getattr(loops, f"{name}_flops")()
            found[f"torch.{name}"] = max(work / _seconds(loops, name, n) for _ in range(rounds))
    return {name: rate / 1e9 for name, rate in found.items()}


def _seconds(loops: ctypes.CDLL, name: str, n: int) -> float:
    start = time.process_time()
    getattr(loops, name)(ctypes.c_long(n))
    return time.process_time() - start
