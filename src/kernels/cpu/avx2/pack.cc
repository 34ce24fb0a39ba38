// Packing the codes of 16 rows for AVX2: words of several columns are made row by row, 8 lines at a
// time, then 8 rows by 8 lines of words are transposed.
#include <immintrin.h>

#include "kernels/packed_layout.h"

#pragma GCC push_options
#pragma GCC target("avx2")

namespace quantal::kernels {
namespace {

constexpr int kHalfRows = 8;
constexpr int kLines = 8;  ///< a register has a word of so many lines
constexpr std::int64_t kCacheLine = 64;
constexpr int kPrefetchBytes = 512;

__m256i load(const std::uint8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

// The even words of `a`, then those of `b`, each 128 bits apart as the shuffle leaves them.
__m256i even_words(__m256i a, __m256i b) {
  return _mm256_castps_si256(
      _mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0b10'00'10'00));
}

// Codes of one row, bits [shift, shift + bits) of the bytes at `from`, as its words of 8 lines.
template <int bits>
__m256i row_words(const std::uint8_t* from, int shift, __m256i flip);

template <>
__m256i row_words<8>(const std::uint8_t* from, int, __m256i flip) {
  return _mm256_xor_si256(load(from), flip);
}

// 32 codes alone in their bytes.
__m256i narrow_codes(const std::uint8_t* from, int shift, int mask) {
  const __m256i shifted = _mm256_srl_epi16(load(from), _mm_cvtsi32_si128(shift));
  return _mm256_and_si256(shifted, _mm256_set1_epi8(static_cast<char>(mask)));
}

template <>
__m256i row_words<4>(const std::uint8_t* from, int shift, __m256i) {
  __m256i pairs[2];
  for (int i = 0; i < 2; ++i) {
    const __m256i codes = narrow_codes(from + 32L * i, shift, 0xF);
    pairs[i] = _mm256_or_si256(codes, _mm256_srli_epi64(codes, 32 - 4));
  }
  return _mm256_permute4x64_epi64(even_words(pairs[0], pairs[1]), 0b11'01'10'00);
}

template <>
__m256i row_words<2>(const std::uint8_t* from, int shift, __m256i) {
  __m256i quads[4];
  for (int i = 0; i < 4; ++i) {
    const __m256i codes = narrow_codes(from + 32L * i, shift, 0x3);
    quads[i] = _mm256_or_si256(codes, _mm256_srli_epi64(codes, 32 - 2));
  }
  __m256i pairs[2];
  for (int i = 0; i < 2; ++i) {
    const __m256i words = even_words(quads[2L * i], quads[2L * i + 1]);
    pairs[i] = _mm256_or_si256(words, _mm256_srli_epi64(words, 32 - 4));
  }
  return _mm256_permutevar8x32_epi32(even_words(pairs[0], pairs[1]),
                                     _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// words[r] has 8 lines of row r; line l goes to out + l lines.
void store_transposed(const __m256i (&words)[kHalfRows], std::byte* out) {
  __m256i pairs[kHalfRows], quads[kHalfRows];
  for (int i = 0; i < kHalfRows; i += 2) {
    pairs[i] = _mm256_unpacklo_epi32(words[i], words[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_epi32(words[i], words[i + 1]);
  }
  for (int i = 0; i < kHalfRows; i += 4) {
    quads[i] = _mm256_unpacklo_epi64(pairs[i], pairs[i + 2]);
    quads[i + 1] = _mm256_unpackhi_epi64(pairs[i], pairs[i + 2]);
    quads[i + 2] = _mm256_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    quads[i + 3] = _mm256_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
  for (int i = 0; i < kLines / 2; ++i) {
    auto* line = reinterpret_cast<__m256i*>(out + i * PackedLayout::kLineBytes);
    auto* later = reinterpret_cast<__m256i*>(out + (i + 4) * PackedLayout::kLineBytes);
    _mm256_store_si256(line, _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x20));
    _mm256_store_si256(later, _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x31));
  }
}

// 8 rows, 8 lines.
template <int bits>
void pack_half(const TileRows& rows, int half, std::int64_t column, __m256i flip, std::byte* out) {
  __m256i words[kHalfRows];
  for (int r = 0; r < kHalfRows; ++r) {
    const int row = half * kHalfRows + r;
    words[r] = row_words<bits>(rows.from[row] + column, rows.shift[row], flip);
  }
  store_transposed(words, out + half * (PackedLayout::kLineBytes / 2));
}

template <int bits>
std::int64_t pack_rows(const TileRows& rows, std::int64_t columns, std::uint32_t flip,
                       std::byte* out) {
  constexpr std::int64_t kColumns = kLines * 32 / bits;
  constexpr std::int64_t kBytes = kLines * PackedLayout::kLineBytes;
  // Rows are often a multiple of 4096 bytes apart, where all of them fall into one set of the
  // cache: whole cache lines of a row are read at once.
  constexpr int kSteps = kColumns < kCacheLine ? kCacheLine / kColumns : 1;
  const __m256i flipped = _mm256_set1_epi32(static_cast<std::int32_t>(flip));
  std::int64_t column = 0;
  for (; column + kSteps * kColumns <= columns; column += kSteps * kColumns) {
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; r < kHalfRows; ++r) {
        const std::uint8_t* row = rows.from[half * kHalfRows + r];
        _mm_prefetch(reinterpret_cast<const char*>(row + column) + kPrefetchBytes, _MM_HINT_T0);
      }
      for (int step = 0; step < kSteps; ++step) {
        pack_half<bits>(rows, half, column + step * kColumns, flipped, out + step * kBytes);
      }
    }
    out += kSteps * kBytes;
  }
  for (; column + kColumns <= columns; column += kColumns, out += kBytes) {
    for (int half = 0; half < 2; ++half) pack_half<bits>(rows, half, column, flipped, out);
  }
  return column;
}

}  // namespace

std::int64_t pack_rows__avx2(int bits, const TileRows& rows, std::int64_t columns,
                             std::uint32_t flip, std::byte* lines) {
  switch (bits) {
    case 2:
      return pack_rows<2>(rows, columns, flip, lines);
    case 4:
      return pack_rows<4>(rows, columns, flip, lines);
    default:
      return pack_rows<8>(rows, columns, flip, lines);
  }
}

}  // namespace quantal::kernels

#pragma GCC pop_options
