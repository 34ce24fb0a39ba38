#include "kernels/integer_linear.h"

#include "kernels/variants.h"

namespace quantal::kernels {

IntegerLinearKernel find_integer_linear(Isa isa, const WeightSpec& spec) {
  const bool is_integer =
      spec.qtype == QTypeId::kInt8 || spec.qtype == QTypeId::kInt4 || spec.qtype == QTypeId::kInt2;
  if (!is_integer) return nullptr;
  return best_variant<IntegerLinearKernel>(isa, {
#if defined(__x86_64__)
                                                    {Isa::kAmx, integer_linear__amx},
                                                    {Isa::kAvx512Vnni, integer_linear__avx512_vnni},
                                                    {Isa::kAvx512, integer_linear__avx512},
                                                    {Isa::kAvxVnni, integer_linear__avx_vnni},
                                                    {Isa::kAvx2, integer_linear__avx2},
#elif defined(__aarch64__)
                                                    {Isa::kNeonI8mm, integer_linear__neon_i8mm},
                                                    {Isa::kNeonDotprod,
                                                     integer_linear__neon_dotprod},
                                                    {Isa::kNeon, integer_linear__neon},
#endif
                                                    {Isa::kPortable, integer_linear__portable}});
}

}  // namespace quantal::kernels
