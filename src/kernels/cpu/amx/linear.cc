// Weight-only linear for AMX: tdpbf16ps multiplies pairs of columns. Every code is exact in bf16,
// and so are activations of fp16 and fp32 as a sum of two and three numbers; scale and shift are
// applied to fp32 sums, so that only fp32 additions round. Groups with many bf16 activations are
// the exception: rounds_weight().
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <utility>

#include "kernels/cpu/avx512/bf16_tables.h"
#include "kernels/cpu/avx512/intrinsics.h"
#include "kernels/cpu/detect.h"
#include "kernels/for_qtype.h"
#include "kernels/linear.h"
#include "kernels/scratch.h"

#pragma GCC push_options
#if !defined(QUANTAL_EMULATE)
#pragma GCC target( \
    "amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,avx2,fma,f16c")
#endif

#include "kernels/cpu/amx/floats.h"
#include "kernels/cpu/amx/packed_source.h"

namespace quantal::kernels {
namespace {

// Whether the kernel without tiles is as fast: int8 takes longer to look up than to multiply, and
// fp16 and fp32 are multiplied in parts.
bool has_few_tokens(const LinearArgs& args) {
  const bool gains = args.type == FloatType::kBF16 && args.layout->spec().qtype != QTypeId::kInt8;
  return args.tokens <= (gains ? 2 : 4);
}

}  // namespace

void linear__amx(const LinearArgs& args, const ParallelFor& parallel_for) {
  if (has_few_tokens(args)) return linear__avx512_vbmi(args, parallel_for);
  for_qtype(args.layout->spec().qtype, [&]<QTypeId qtype>() {
    const auto source = [&]<typename Line>() {
      return PackedSource<Line>(*args.layout, args.weight);
    };
    multiply_floats<qtype>(args, source, parallel_for);
  });
}

}  // namespace quantal::kernels

#pragma GCC pop_options
