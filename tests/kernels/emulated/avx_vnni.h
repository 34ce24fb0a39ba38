#pragma once

// The one intrinsic of AVX-VNNI that src/kernels/cpu/avx2 uses, on a processor without it: the same
// as AVX-512's.

#include <simde/x86/avx512/dpbusd.h>

#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32
