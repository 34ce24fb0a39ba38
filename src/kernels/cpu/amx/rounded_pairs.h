#pragma once

// Included by this folder's files only, below their target pragma: weights whose groups have scales
// of their own as bf16 numbers, so that whole rows are summed up in tiles.

#include <array>

#include "kernels/cpu/amx/tile_job.h"
#include "kernels/cpu/avx512/table_lines.h"

namespace quantal::kernels {
namespace {

/// scale · code − shift of a group of a tile, in fp32, rounded to bf16 (half to even).
template <int bits>
class RoundedPairs : public NarrowPairs<bits> {
 public:
  explicit RoundedPairs(const TileScales& scales) : scales_(scales) {}

  template <int step>
  __m512i get() const {
    return look_up(NarrowPairs<bits>::template index<step>());
  }

  /// Codes in the low bits of 32 words.
  __m512i look_up(__m512i index) const {
    const __m512 low = value(index), high = value(_mm512_srli_epi32(index, 16));
    const auto pairs = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    return _mm512_permutexvar_epi16(_mm512_loadu_si512(kInterleaved.data()), pairs);
  }

 private:
  // Of the code in the low bits of each number.
  __m512 value(__m512i index) const {
    const __m512 code = _mm512_permutexvar_ps(index, _mm512_loadu_ps(kCodes.data()));
    return _mm512_fmsub_ps(code, scales_.scale, scales_.shift);
  }

  static constexpr auto kCodes = [] {
    std::array<float, 16> codes{};
    for (int i = 0; i < 16; ++i) codes[i] = static_cast<float>(i & ((1 << bits) - 1));
    return codes;
  }();
  static constexpr auto kInterleaved = [] {
    std::array<std::uint16_t, 32> order{};
    for (int i = 0; i < 32; ++i) order[i] = static_cast<std::uint16_t>(i / 2 + i % 2 * 16);
    return order;
  }();

  TileScales scales_;
};

}  // namespace
}  // namespace quantal::kernels
