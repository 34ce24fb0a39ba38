#pragma once

#include <string>
#include <string_view>
#include <vector>

#include <quantal/api.h>
#include <quantal/status.h>

namespace quantal {

/// What a CPU kernel is compiled for. Free of torch.
enum class Isa {
  kPortable,     ///< plain C++, on every processor
  kAvx2,         ///< x86-64 with AVX2, FMA and F16C
  kAvxVnni,      ///< and AVX-VNNI
  kAvx512,       ///< AVX2 and AVX-512 F, BW, DQ and VL
  kAvx512Vnni,   ///< and AVX-512 VNNI
  kAvx512Vbmi,   ///< and AVX-512 VBMI
  kAvx512Bf16,   ///< and AVX-512 BF16
  kAmx,          ///< and AMX-TILE, AMX-INT8 and AMX-BF16
  kNeon,         ///< every AArch64
  kNeonDotprod,  ///< and FEAT_DotProd
  kNeonI8mm,     ///< and FEAT_I8MM
  kNeonBf16,     ///< and FEAT_BF16
};

/// "portable", "avx2", …
QUANTAL_API std::string_view isa_name(Isa isa);

/// What this processor and operating system can run, best first; kPortable is always the last.
QUANTAL_API const std::vector<Isa>& supported_isas();

/// What kernels run with: the best, or the one that QUANTAL_ISA names (read once).
/// kInvalidArgument where it names none, or one that this machine cannot run.
QUANTAL_API Result<Isa> active_isa();

/// The choice that the value of QUANTAL_ISA (null: unset) means on this machine.
QUANTAL_API Result<Isa> choose_isa(const char* name);

}  // namespace quantal
