// Weight-only linear for AVX-512 in fp32.
#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "kernels/cpu/avx512/intrinsics.h"
#include "kernels/cpu/detect.h"
#include "kernels/for_qtype.h"
#include "kernels/linear.h"
#include "kernels/scratch.h"

#pragma GCC push_options
#if !defined(QUANTAL_EMULATE)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#include "kernels/cpu/avx512/float_lines.h"
#include "kernels/cpu/avx512/float_product.h"

namespace quantal::kernels {

void linear__avx512(const LinearArgs& args, const ParallelFor& parallel_for) {
  if (args.tokens == 0) return;
  const Activations<FloatRow> x(args, parallel_for);
  const Job job = x.job();
  for_qtype(args.layout->spec().qtype, [&]<QTypeId qtype>() {
    constexpr bool kIsAffine = qtype == QTypeId::kInt2 || qtype == QTypeId::kInt4;
    multiply<FloatLine<qtype>, FloatProduct<kIsAffine>>(job, parallel_for);
  });
}

}  // namespace quantal::kernels

#pragma GCC pop_options
