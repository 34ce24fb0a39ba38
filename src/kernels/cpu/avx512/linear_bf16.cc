// Weight-only linear for bf16 activations: vdpbf16ps multiplies pairs of columns. Every code is
// exact in bf16, and scale and shift are applied to fp32 sums, so that only fp32 additions round.
// The instruction takes denormal activations (below 2^-126) for zeros.
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
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi,avx2,fma,f16c")
#endif

#include "kernels/cpu/avx512/activations.h"
#include "kernels/cpu/avx512/table_lines.h"

namespace quantal::kernels {
namespace {

template <bool is_affine>
struct BF16Product : FloatSums<is_affine> {
  static inline __attribute__((always_inline)) void add(__m512& sum, __m512i weight, __m512i x) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)x);
  }
};

/// Columns in the order of a Line's steps.
template <typename Line>
struct BF16Row {
  static constexpr int kBytes = 2;  ///< of a column

  static void copy(const LinearArgs& args, std::int64_t from, std::int64_t columns,
                   std::int32_t* to) {
    const auto* x = static_cast<const std::uint16_t*>(args.x) + from;
    const __m512i order = _mm512_loadu_si512(kOrder.data());
    for (std::int64_t i = 0; i < columns; i += 32) {
      const auto lanes = static_cast<__mmask32>(
          columns - i >= 32 ? ~std::uint32_t{0} : (std::uint32_t{1} << (columns - i)) - 1);
      const __m512i values = _mm512_maskz_loadu_epi16(lanes, x + i);
      _mm512_storeu_si512(to + i / 2, _mm512_permutexvar_epi16(order, values));
    }
  }

  static constexpr auto kOrder = [] {
    std::array<std::uint16_t, 32> order{};
    for (int i = 0; i < 32; ++i) order[i] = static_cast<std::uint16_t>(column_at<Line>(i));
    return order;
  }();
};

template <typename Line, bool is_affine>
void run(const LinearArgs& args, const ParallelFor& parallel_for) {
  const Activations<BF16Row<Line>> x(args, parallel_for);
  multiply<Line, BF16Product<is_affine>>(x.job(), parallel_for);
}

}  // namespace

void linear__avx512_bf16(const LinearArgs& args, const ParallelFor& parallel_for) {
  if (args.tokens == 0) return;
  if (args.type != FloatType::kBF16) return linear__avx512_vbmi(args, parallel_for);
  for_qtype(args.layout->spec().qtype, [&]<QTypeId qtype>() {
    if constexpr (qtype == QTypeId::kInt2) {
      run<NarrowPairs<2>, true>(args, parallel_for);
    } else if constexpr (qtype == QTypeId::kInt4) {
      run<NarrowPairs<4>, true>(args, parallel_for);
    } else {
      run<WidePairs<qtype>, false>(args, parallel_for);
    }
  });
}

}  // namespace quantal::kernels

#pragma GCC pop_options
