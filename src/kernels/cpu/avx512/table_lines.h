#pragma once

// Included by files for AVX-512 and what it is a part of, below their target pragma: lines as pairs
// of bf16 numbers, looked up in tables (AVX-512 VBMI). Step s of a line has columns first(s) and
// first(s) + kApart.

#include "kernels/cpu/avx512/bf16_tables.h"
#include "kernels/cpu/avx512/rows.h"

namespace quantal::kernels {
namespace {

/// Codes of 8 bits.
template <QTypeId qtype>
struct WidePairs {
  static constexpr int kSteps = 2;
  static constexpr int kApart = 1;
  static constexpr int first(int step) { return 2 * step; }

  void load(const std::byte* line) { decode(_mm512_loadu_si512(line)); }
  void decode(__m512i line) {
    // In each 4 rows: the first two columns of every row, then the others.
    const __m512i pairs = _mm512_set4_epi32(0x0F0E0B0A, 0x07060302, 0x0D0C0908, 0x05040100);
    const __m512i codes = _mm512_shuffle_epi8(line, pairs);
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

/// Codes of 4 and 2 bits, in the low bits of 32 words, by a permutation of 32 numbers of which only
/// the 2^bits lowest differ: no mask is needed. Step i has the columns first(i) and first(i) + 2,
/// which are the low and the high word of a row.
template <int bits>
struct NarrowPairs {
  static constexpr int kSteps = 16 / bits;
  static constexpr int kApart = 2;
  static constexpr int first(int step) { return bits * step % 8 / bits * 4 + bits * step / 8; }

  void load(const std::byte* line) { words = _mm512_loadu_si512(line); }

  template <int step>
  __m512i index() const {
    return step == 0 ? words : _mm512_srli_epi16(words, bits * step);
  }
  template <int step>
  __m512i get() const {
    return look_up(index<step>());
  }

  static __m512i look_up(__m512i index) {
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

/// The column of the i-th number of lines whose steps follow each other.
template <typename Line>
constexpr int column_at(int i) {
  const int step = i / 2 % Line::kSteps, line = i / 2 / Line::kSteps;
  return line * Line::kSteps * 2 + Line::first(step) + i % 2 * Line::kApart;
}

}  // namespace
}  // namespace quantal::kernels
