// Integer linear for AVX-512 with VNNI: vpdpbusd multiplies unsigned weights by signed activations.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <utility>

#include "kernels/cpu/avx512/intrinsics.h"
#include "kernels/cpu/detect.h"
#include "kernels/integer_linear.h"
#include "kernels/scratch.h"

#pragma GCC push_options
#if !defined(QUANTAL_EMULATE)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#endif

#include "kernels/cpu/avx512/integer.h"
#include "kernels/cpu/avx512/vnni.h"

namespace quantal::kernels {
namespace {

template <int bits>
struct VnniDot {
  static inline __attribute__((always_inline)) void add(__m512i& sum, __m512i weight, __m512i x) {
    add_byte_products(sum, weight, x);
  }
};

}  // namespace

void integer_linear__avx512_vnni(const IntegerLinearArgs& args, const ParallelFor& parallel_for) {
  integer_linear<VnniDot>(args, parallel_for);
}

}  // namespace quantal::kernels

#pragma GCC pop_options
