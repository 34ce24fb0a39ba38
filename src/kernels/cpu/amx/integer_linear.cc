// Integer linear for AMX: tdpbsud multiplies signed activations by unsigned weights.
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
#pragma GCC target("amx-tile,amx-int8,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#include "kernels/cpu/amx/codes.h"
#include "kernels/cpu/amx/packed_source.h"

namespace quantal::kernels {
namespace {

// Up to so many, the kernel without tiles is as fast.
constexpr std::int64_t kFewTokens = 4;

template <int bits>
void run(const IntegerLinearArgs& args, const ParallelFor& parallel_for) {
  using Source = PackedSource<ByteLine<bits>>;
  multiply_codes<Source, bits>(args, Source(*args.layout, args.weight), parallel_for);
}

}  // namespace

void integer_linear__amx(const IntegerLinearArgs& args, const ParallelFor& parallel_for) {
  if (args.source.tokens <= kFewTokens) return integer_linear__avx512_vnni(args, parallel_for);
  switch (args.layout->spec().qtype) {
    case QTypeId::kInt2:
      return run<2>(args, parallel_for);
    case QTypeId::kInt4:
      return run<4>(args, parallel_for);
    default:
      return run<8>(args, parallel_for);
  }
}

}  // namespace quantal::kernels

#pragma GCC pop_options
