// Integer linear for NEON with dot products (FEAT_DotProd): sdot adds four products to each of 4
// rows.
#include "kernels/integer_linear.h"

#include <arm_neon.h>

#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>

#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")

#include "kernels/cpu/neon/lane_dot.h"

namespace quantal::kernels {

void integer_linear__neon_dotprod(const IntegerLinearArgs& args, const ParallelFor& parallel_for) {
  run_any<LaneDot>(args, parallel_for);
}

}  // namespace quantal::kernels

#pragma GCC pop_options
