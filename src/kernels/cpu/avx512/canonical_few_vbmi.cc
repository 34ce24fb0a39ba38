// The same with float8 codes from tables (AVX-512 VBMI), of 64 columns at once.
#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "kernels/canonical_linear.h"
#include "kernels/cpu/avx512/bf16_tables.h"
#include "kernels/cpu/avx512/intrinsics.h"
#include "kernels/for_qtype.h"

#pragma GCC push_options
#if !defined(QUANTAL_EMULATE)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx2,fma,f16c")
#endif

#include "kernels/cpu/avx512/canonical_vector.h"
#include "kernels/cpu/avx512/table_lines.h"

namespace quantal::kernels {
namespace {

/// Low and high bytes are put together in each 16 bytes by themselves, in pairs of columns, of
/// which bf16 is the upper half of fp32: part p has columns 16 l + 2 i + p % 2 + 8 (p / 2), where l
/// are the 4 numbers i.
struct Floats64 : Floats16 {
  static constexpr int kParts = 4;

  static void arrange(float* x, std::int64_t columns) {
    float block[kParts * kLanes];
    for (const float* end = x + columns; x < end; x += kParts * kLanes) {
      std::copy_n(x, kParts * kLanes, block);
      for (int i = 0; i < kParts * kLanes; ++i) {
        const int part = i / kLanes, lane = i % kLanes;
        x[i] = block[lane / 4 * 16 + lane % 4 * 2 + part % 2 + part / 2 * 8];
      }
    }
  }

  template <QTypeId qtype>
  static void decode(const std::uint8_t* bytes, __m512 (&values)[kParts][1]) {
    const __m512i codes = _mm512_loadu_si512(bytes);
    const __m512i low = WidePairs<qtype>::look_up(WidePairs<qtype>::kTable.low.data(), codes);
    const __m512i high = WidePairs<qtype>::look_up(WidePairs<qtype>::kTable.high.data(), codes);
    const __m512i pairs[2] = {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
    QUANTAL_UNROLL for (int i = 0; i < 2; ++i) {
      values[2 * i][0] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs[i], 16));
      values[2 * i + 1][0] = _mm512_castsi512_ps(_mm512_and_si512(pairs[i], upper));
    }
  }
};

}  // namespace

void few_from_canonical__avx512_vbmi(const LinearArgs& args, const CanonicalWeight& weight,
                                     const ParallelFor& parallel_for) {
  const Operands w = operands_of(*args.layout, weight);
  for_qtype(args.layout->spec().qtype, [&]<QTypeId qtype>() {
    if constexpr (kSections<qtype> == 1 && qtype != QTypeId::kInt8) {
      constexpr int kStep = Floats64::kParts * Floats64::kLanes;
      if (w.group_columns % kStep == 0) return run_floats<Floats64, qtype>(args, w, parallel_for);
    }
    few_from_canonical__avx512(args, weight, parallel_for);
  });
}

}  // namespace quantal::kernels

#pragma GCC pop_options
