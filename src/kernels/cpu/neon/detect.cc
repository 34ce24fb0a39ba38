#include "kernels/cpu/neon/detect.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace quantal::kernels {

std::vector<Isa> detect_neon() {
#if defined(__aarch64__) && defined(__linux__)
  // What the kernel names here, processor and kernel both support.
  const bool has_dotprod = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
  const bool has_i8mm = (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0;
  const bool has_bf16 = (getauxval(AT_HWCAP2) & HWCAP2_BF16) != 0;
  if (has_dotprod && has_i8mm && has_bf16) {
    return {Isa::kNeonBf16, Isa::kNeonI8mm, Isa::kNeonDotprod, Isa::kNeon};
  }
  if (has_dotprod && has_i8mm) return {Isa::kNeonI8mm, Isa::kNeonDotprod, Isa::kNeon};
  if (has_dotprod) return {Isa::kNeonDotprod, Isa::kNeon};
  return {Isa::kNeon};
#elif defined(__aarch64__)
  // Part of every AArch64; what else there is, another operating system tells in its own way.
  return {Isa::kNeon};
#else
  return {};
#endif
}

}  // namespace quantal::kernels
