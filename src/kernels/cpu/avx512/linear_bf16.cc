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

/// Codes of 4 and 2 bits, in the low bits of 32 words, by a permutation of 32 numbers of which only
/// the 2^bits lowest differ: no mask is needed. Step i has the columns first(i) and first(i) + 2,
/// which are the low and the high word of a row.
template <int bits>
struct NarrowLine {
  static constexpr int kSteps = 16 / bits;
  static constexpr int first(int step) { return bits * step % 8 / bits * 4 + bits * step / 8; }

  void load(const std::byte* line) { words = _mm512_loadu_si512(line); }

  template <int step>
  __m512i get() const {
    const __m512i index = step == 0 ? words : _mm512_srli_epi16(words, bits * step);
    return _mm512_permutexvar_epi16(index, _mm512_loadu_si512(kTable.data()));
  }

  static constexpr auto kTable = [] {
    std::array<std::uint16_t, 32> table{};
    for (int i = 0; i < 32; ++i) {
      const auto value = static_cast<float>(i & ((1 << bits) - 1));
      table[i] = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16);
    }
    return table;
  }();

  __m512i words;
};

/// Columns in the order of a Line's steps.
template <typename Line, bool pairs_are_apart>
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
    for (int i = 0; i < 32; ++i) {
      const int step = i / 2 % Line::kSteps, line = i / 2 / Line::kSteps;
      const int column = Line::first(step) + i % 2 * (pairs_are_apart ? 2 : 1);
      order[i] = static_cast<std::uint16_t>(line * Line::kSteps * 2 + column);
    }
    return order;
  }();
};

template <typename Line, bool is_affine>
void run(const LinearArgs& args, const ParallelFor& parallel_for) {
  const Activations<BF16Row<Line, is_affine>> x(args, parallel_for);
  multiply<Line, BF16Product<is_affine>>(x.job(), parallel_for);
}

}  // namespace

void linear__avx512_bf16(const LinearArgs& args, const ParallelFor& parallel_for) {
  if (args.tokens == 0) return;
  if (args.type != FloatType::kBF16) return linear__avx512_vbmi(args, parallel_for);
  for_qtype(args.layout->spec().qtype, [&]<QTypeId qtype>() {
    if constexpr (qtype == QTypeId::kInt2) {
      run<NarrowLine<2>, true>(args, parallel_for);
    } else if constexpr (qtype == QTypeId::kInt4) {
      run<NarrowLine<4>, true>(args, parallel_for);
    } else {
      run<WideLine<qtype>, false>(args, parallel_for);
    }
  });
}

}  // namespace quantal::kernels

#pragma GCC pop_options
