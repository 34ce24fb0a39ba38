// What the emulated kernels stand for, instead of what the processor has. They need AVX2.
#include "kernels/cpu/detect.h"

namespace quantal::kernels {

std::vector<Isa> detect_isas() {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return {Isa::kPortable};
  return {Isa::kAmx,    Isa::kAvx512Bf16, Isa::kAvx512Vbmi, Isa::kAvx512Vnni,
          Isa::kAvx512, Isa::kAvxVnni,    Isa::kPortable};
}

bool multiplies_bf16_fast() { return false; }

std::int64_t prefetch_bytes() { return 1024; }

}  // namespace quantal::kernels
