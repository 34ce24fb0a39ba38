// A few tokens by a weight in canonical form, for AVX-512 (avx2/canonical_rows.h).
#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "kernels/canonical_linear.h"
#include "kernels/cpu/avx512/intrinsics.h"
#include "kernels/for_qtype.h"

#pragma GCC push_options
#if !defined(QUANTAL_EMULATE)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#include "kernels/cpu/avx512/canonical_vector.h"

namespace quantal::kernels {

void few_from_canonical__avx512(const LinearArgs& args, const CanonicalWeight& weight,
                                const ParallelFor& parallel_for) {
  const Operands w = operands_of(*args.layout, weight);
  if (w.group_columns % Floats16::kLanes != 0) {
    return few_from_canonical__avx2(args, weight, parallel_for);
  }
  for_qtype(args.layout->spec().qtype,
            [&]<QTypeId qtype>() { run_floats<Floats16, qtype>(args, w, parallel_for); });
}

}  // namespace quantal::kernels

#pragma GCC pop_options
