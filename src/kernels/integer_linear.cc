#include "kernels/integer_linear.h"

namespace quantal::kernels {

IntegerLinearKernel find_integer_linear(Isa isa, const WeightSpec& spec) {
  const bool is_integer =
      spec.qtype == QTypeId::kInt8 || spec.qtype == QTypeId::kInt4 || spec.qtype == QTypeId::kInt2;
  if (!is_integer) return nullptr;
  switch (isa) {
    case Isa::kAvx2:
#if defined(__x86_64__)
      return integer_linear__avx2;
#else
      return nullptr;
#endif
    case Isa::kPortable:
      return integer_linear__portable;
  }
  return nullptr;
}

}  // namespace quantal::kernels
