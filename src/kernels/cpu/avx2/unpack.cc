// Unpacking the codes of half a tile for AVX2.
#include <immintrin.h>

#include "kernels/packed_layout.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "kernels/cpu/avx2/half_tile.h"

namespace quantal::kernels {
namespace {

template <int bits>
std::int64_t unpack_rows(const std::byte* lines, std::int64_t columns, std::uint32_t flip,
                         const HalfRows& rows) {
  constexpr std::int64_t kColumns = kLines * 32 / bits;
  std::int64_t column = 0;
  for (; column + kColumns <= columns; column += kColumns) {
    __m256i words[kLines];
    load_words(lines + column / kColumns * kLines * PackedLayout::kLineBytes, flip, words);
    for (std::int64_t r = 0; r < kHalfRows; ++r) {
      __m128i bytes[16 / bits];
      split<bits>(words[r], bytes);
      const __m128i shift = _mm_cvtsi32_si128(rows.shift[r]);
      auto* to = reinterpret_cast<__m128i*>(rows.to[r] + column);
      // A code is alone in its byte: none of its bits goes to the next one.
      QUANTAL_UNROLL for (int i = 0; i < 16 / bits; ++i) {
        const __m128i codes = _mm_sll_epi16(bytes[i], shift);
        _mm_storeu_si128(to + i, _mm_or_si128(_mm_loadu_si128(to + i), codes));
      }
    }
  }
  return column;
}

}  // namespace

std::int64_t unpack_rows__avx2(int bits, const std::byte* lines, std::int64_t columns,
                               std::uint32_t flip, const HalfRows& rows) {
  switch (bits) {
    case 2:
      return unpack_rows<2>(lines, columns, flip, rows);
    case 4:
      return unpack_rows<4>(lines, columns, flip, rows);
    default:
      return unpack_rows<8>(lines, columns, flip, rows);
  }
}

}  // namespace quantal::kernels

#pragma GCC pop_options
