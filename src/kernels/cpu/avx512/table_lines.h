#pragma once

// Included by this folder's files only, below their target pragma: lines of 8-bit codes as bf16,
// looked up in tables (AVX-512 VBMI).

#include "kernels/cpu/avx512/bf16_tables.h"
#include "kernels/cpu/avx512/rows.h"

namespace quantal::kernels {
namespace {

/// Codes of 8 bits. Step 0 has columns 0 and 1, step 1 columns 2 and 3.
template <QTypeId qtype>
struct WideLine {
  static constexpr int kSteps = 2;
  static constexpr int first(int step) { return 2 * step; }

  void load(const std::byte* line) {
    // In each 4 rows: the first two columns of every row, then the others.
    const __m512i pairs = _mm512_set4_epi32(0x0F0E0B0A, 0x07060302, 0x0D0C0908, 0x05040100);
    const __m512i codes = _mm512_shuffle_epi8(_mm512_loadu_si512(line), pairs);
    const __m512i low = look_up(kTable.low.data(), codes);
    const __m512i high = look_up(kTable.high.data(), codes);
    steps[0] = _mm512_unpacklo_epi8(low, high);
    steps[1] = _mm512_unpackhi_epi8(low, high);
  }

  template <int step>
  __m512i get() const {
    return steps[step];
  }

  static __m512i look_up(const std::uint8_t* table, __m512i codes) {
    const __m512i positive =
        _mm512_permutex2var_epi8(_mm512_loadu_si512(table), codes, _mm512_loadu_si512(table + 64));
    const __m512i negative = _mm512_permutex2var_epi8(_mm512_loadu_si512(table + 128), codes,
                                                      _mm512_loadu_si512(table + 192));
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), positive, negative);
  }

  static constexpr ByteTable kTable = byte_table(qtype);

  __m512i steps[2];
};

}  // namespace
}  // namespace quantal::kernels
