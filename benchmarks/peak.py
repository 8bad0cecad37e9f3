"""The arithmetic peak of one core, measured: fused multiply-adds on registers and nothing else.

torch.mm is no measure of it: on some machines it reaches half of what the processor can do.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

# As many sums as the registers hold: each instruction waits for none of those before it.
SOURCE = r"""
#include <immintrin.h>
#if defined(__AVX512F__)
#define SUMS 24
#define IN_REGISTER "+v"
#else
#define SUMS 12
#define IN_REGISTER "+x"
#endif
#define LOOP(type, step)                                    \
  type acc[SUMS] = {};                                      \
  for (long i = 0; i < n; ++i)                              \
    _Pragma("GCC unroll 24") for (int j = 0; j < SUMS; ++j) { \
      acc[j] = step;                                        \
      __asm__ volatile("" : IN_REGISTER(acc[j]));           \
    }
#if defined(__AVX512F__)
#define FLOPS 32
void float32(long n) {
  __m512 x = _mm512_set1_ps(0.5f);
  __asm__ volatile("" : IN_REGISTER(x));
  LOOP(__m512, _mm512_fmadd_ps(x, x, acc[j]))
}
#else
#define FLOPS 16
void float32(long n) {
  __m256 x = _mm256_set1_ps(0.5f);
  __asm__ volatile("" : IN_REGISTER(x));
  LOOP(__m256, _mm256_fmadd_ps(x, x, acc[j]))
}
#endif
long float32_flops(void) { return SUMS * FLOPS; }
#if defined(__AVX512BF16__)
void bfloat16(long n) {
  __m512i x = _mm512_set1_epi16(0x3f00);
  __asm__ volatile("" : IN_REGISTER(x));
  LOOP(__m512, _mm512_dpbf16_ps(acc[j], (__m512bh)x, (__m512bh)x))
}
long bfloat16_flops(void) { return SUMS * 64; }
#endif
"""
REPEATS = 4_000_000  # some 10 to 30 ms


@functools.cache
def loops() -> ctypes.CDLL | str:
    """The compiled loops, or why there are none."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return "no compiler"
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "peak.c"), Path(folder, "peak.so")
        source.write_text(SOURCE)
        command = [compiler, "-x", "c", "-O3", "-march=native", "-shared", "-fPIC"]
        done = subprocess.run(
            [*command, str(source), "-o", str(library)], capture_output=True, text=True
        )
        if done.returncode:
            return done.stderr.strip().splitlines()[-1]
        return ctypes.CDLL(str(library))


def peaks(rounds: int = 5) -> dict[str, float] | str:
    """GFLOP/s of one thread by dtype, the best of some rounds; or why there is no number."""
    library = loops()
    if isinstance(library, str):
        return library
    found = {}
    for name in ("float32", "bfloat16"):
        if hasattr(library, name):
            work = REPEATS * getattr(library, f"{name}_flops")()
            best = min(_cpu_seconds(library, name) for _ in range(rounds))
            found[f"torch.{name}"] = work / best / 1e9
    return found


def _cpu_seconds(library: ctypes.CDLL, name: str) -> float:
    start = time.process_time()
    getattr(library, name)(ctypes.c_long(REPEATS))
    return time.process_time() - start


def multiply_adds(threads: int) -> float | None:
    """Wall seconds of a fixed number of multiply-adds shared by `threads`; None: no compiler.

    What this wins with a second thread is what the machine itself can win.
    """
    library = loops()
    if isinstance(library, str):
        return None
    n = ctypes.c_long(2 * REPEATS // threads)
    started = [threading.Thread(target=library.float32, args=(n,)) for _ in range(threads)]
    start = time.perf_counter()
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    return time.perf_counter() - start
