#pragma once

// Included by this folder's files only, below their target pragma.
//
// Taking half a tile apart: eight lines of eight rows are transposed, which leaves 32 or more
// consecutive columns of a row in a register.

#include <immintrin.h>

#include "kernels/cpu/avx2/rows.h"

namespace quantal::kernels {
namespace {

constexpr int kLines = 8;  ///< a register has a word of so many lines

/// words[line] has a word of every row; afterwards words[row] has one of every line.
inline void transpose(__m256i (&words)[kLines]) {
  __m256i pairs[kLines], quads[kLines];
  QUANTAL_UNROLL for (int i = 0; i < kLines; i += 2) {
    pairs[i] = _mm256_unpacklo_epi32(words[i], words[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_epi32(words[i], words[i + 1]);
  }
  QUANTAL_UNROLL for (int i = 0; i < kLines; i += 4) {
    QUANTAL_UNROLL for (int j = 0; j < 2; ++j) {
      quads[i + 2 * j] = _mm256_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
      quads[i + 2 * j + 1] = _mm256_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
    }
  }
  QUANTAL_UNROLL for (int i = 0; i < 4; ++i) {
    words[i] = _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x20);
    words[i + 4] = _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x31);
  }
}

/// Takes a row's words of eight lines apart: bytes[i] has columns [16 i, 16 i + 16) as stored
/// codes.
template <int bits>
inline void split(__m256i words, __m128i (&bytes)[16 / bits]) {
  const __m256i mask = _mm256_set1_epi8(static_cast<char>((1 << bits) - 1));
  if constexpr (bits == 8) {
    bytes[0] = _mm256_castsi256_si128(words);
    bytes[1] = _mm256_extracti128_si256(words, 1);
  } else if constexpr (bits == 4) {
    const __m256i low = _mm256_and_si256(words, mask);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(words, 4), mask);
    const __m256i even = _mm256_unpacklo_epi32(low, high);
    const __m256i odd = _mm256_unpackhi_epi32(low, high);
    bytes[0] = _mm256_castsi256_si128(even);
    bytes[1] = _mm256_castsi256_si128(odd);
    bytes[2] = _mm256_extracti128_si256(even, 1);
    bytes[3] = _mm256_extracti128_si256(odd, 1);
  } else {
    __m256i plane[4], pair[4];
    QUANTAL_UNROLL for (int p = 0; p < 4; ++p) {
      plane[p] = _mm256_and_si256(_mm256_srli_epi16(words, 2 * p), mask);
    }
    pair[0] = _mm256_unpacklo_epi32(plane[0], plane[1]);
    pair[1] = _mm256_unpacklo_epi32(plane[2], plane[3]);
    pair[2] = _mm256_unpackhi_epi32(plane[0], plane[1]);
    pair[3] = _mm256_unpackhi_epi32(plane[2], plane[3]);
    QUANTAL_UNROLL for (int half = 0; half < 2; ++half) {
      const __m256i even = _mm256_unpacklo_epi64(pair[2 * half], pair[2 * half + 1]);
      const __m256i odd = _mm256_unpackhi_epi64(pair[2 * half], pair[2 * half + 1]);
      bytes[2 * half] = _mm256_castsi256_si128(even);
      bytes[2 * half + 1] = _mm256_castsi256_si128(odd);
      bytes[4 + 2 * half] = _mm256_extracti128_si256(even, 1);
      bytes[4 + 2 * half + 1] = _mm256_extracti128_si256(odd, 1);
    }
  }
}

/// Eight lines of a half tile, xor `flip`, as the words of its eight rows.
inline void load_words(const std::byte* lines, std::uint32_t flip, __m256i (&words)[kLines]) {
  const __m256i flipped = _mm256_set1_epi32(static_cast<std::int32_t>(flip));
  QUANTAL_UNROLL for (int i = 0; i < kLines; ++i) {
    const auto* line = reinterpret_cast<const __m256i*>(lines + i * PackedLayout::kLineBytes);
    words[i] = _mm256_xor_si256(_mm256_loadu_si256(line), flipped);
  }
  transpose(words);
}

}  // namespace
}  // namespace quantal::kernels
