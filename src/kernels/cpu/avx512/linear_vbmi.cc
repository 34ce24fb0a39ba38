// Weight-only linear in fp32 for AVX-512 with VBMI, which has float8 codes from tables, in half as
// many instructions as without.
#include <algorithm>
#include <array>
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
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx2,fma,f16c")
#endif

#include "kernels/cpu/avx512/float_product.h"
#include "kernels/cpu/avx512/table_lines.h"

namespace quantal::kernels {
namespace {

/// The columns of a WidePairs one by one: bf16 is the upper half of fp32.
template <QTypeId qtype>
struct TableLine {
  static constexpr int kSteps = 4;

  void load(const std::byte* line) { pairs.load(line); }

  template <int step>
  __m512i get() const {
    const __m512i pair = pairs.template get<step / 2>();
    if constexpr (step % 2 == 0) return _mm512_slli_epi32(pair, 16);
    return _mm512_and_si512(pair, _mm512_set1_epi32(static_cast<int>(0xFFFF0000)));
  }

  WidePairs<qtype> pairs;
};

}  // namespace

void linear__avx512_vbmi(const LinearArgs& args, const ParallelFor& parallel_for) {
  for_qtype(args.layout->spec().qtype, [&]<QTypeId qtype>() {
    constexpr bool kIsInteger =
        qtype == QTypeId::kInt2 || qtype == QTypeId::kInt4 || qtype == QTypeId::kInt8;
    if constexpr (kIsInteger) {
      linear__avx512(args, parallel_for);
    } else if (args.tokens > 0) {
      const Activations<FloatRow> x(args, parallel_for);
      multiply<TableLine<qtype>, FloatProduct<false>>(x.job(), parallel_for);
    }
  });
}

}  // namespace quantal::kernels

#pragma GCC pop_options
