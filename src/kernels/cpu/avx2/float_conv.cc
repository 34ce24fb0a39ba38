// Weight-only convolution for AVX2 with FMA: the many tokens of panels.h, which read the input
// where it lies.
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/float_conv.h"
#include "kernels/for_qtype.h"
#include "kernels/linear.h"
#include "kernels/scratch.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "kernels/cpu/avx2/panels.h"
#include "kernels/cpu/avx2/positions.h"

namespace quantal::kernels {
const FloatConvKernel float_conv__avx2 = {load_floats, multiply_positions<Panels>};

}  // namespace quantal::kernels

#pragma GCC pop_options
