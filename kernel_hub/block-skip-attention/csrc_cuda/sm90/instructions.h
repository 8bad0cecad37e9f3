// Hopper's instructions; or, where tests compile the kernels for the CPU, their emulation.
#pragma once
#ifdef BSA_EMULATE
#include "sm90_instructions.h"
#else
#include "ptx.h"
#include "wgmma.h"
#endif
