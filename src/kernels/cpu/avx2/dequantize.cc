// Dequantizing ranges of rows for AVX2: the numbers of the portable reading.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "kernels/linear.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "kernels/cpu/avx2/half_tile.h"
#include "kernels/cpu/avx2/numbers.h"
#include "kernels/cpu/avx2/rows.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kLineBytes = PackedLayout::kLineBytes;

/// Where rows go; `stride` elements are between two of them.
struct Output {
  void* y;
  std::int64_t stride;
};

// Eight lines, for rows [begin, end) of eight, at out.y[index].
template <QTypeId qtype, int bits, FloatType type>
void decode_block(const std::byte* lines, const float* scale, const float* shift,
                  std::int64_t begin, std::int64_t end, const Output& out, std::int64_t index) {
  __m256i words[kLines];
  // int8 is packed as code + 128.
  load_words(lines, qtype == QTypeId::kInt8 ? 0x80808080U : 0, words);
  for (std::int64_t r = begin; r < end; ++r) {
    __m128i bytes[16 / bits];
    split<bits>(words[r], bytes);
    const __m256 by = _mm256_set1_ps(scale[r]), less = _mm256_set1_ps(shift[r]);
    std::int64_t to = index + (r - begin) * out.stride;
    QUANTAL_UNROLL for (int i = 0; i < 16 / bits; ++i) {
      const __m256 first = numbers<qtype>(bytes[i]);
      const __m256 second = numbers<qtype>(_mm_unpackhi_epi64(bytes[i], bytes[i]));
      store_numbers(out.y, to, type, _mm256_sub_ps(_mm256_mul_ps(first, by), less));
      store_numbers(out.y, to + 8, type, _mm256_sub_ps(_mm256_mul_ps(second, by), less));
      to += 16;
    }
  }
}

// A group, for rows [begin, end) of eight, at out.y[index].
template <QTypeId qtype, int bits, FloatType type>
void decode_group(const std::byte* lines, std::int64_t columns, const HalfScales& scales,
                  std::int64_t begin, std::int64_t end, const Output& out, std::int64_t index) {
  constexpr std::int64_t kDepth = 32 / bits, kColumns = kLines * kDepth;
  float scale[kHalfRows], shift[kHalfRows];
  _mm256_storeu_ps(scale, scales.scale);
  _mm256_storeu_ps(shift, scales.shift);
  std::int64_t column = 0;
  for (; column + kColumns <= columns; column += kColumns, lines += kLines * kLineBytes) {
    decode_block<qtype, bits, type>(lines, scale, shift, begin, end, out, index + column);
  }
  if (column == columns) return;
  // The last lines, with others of zeros, and of them the columns that there are.
  const std::int64_t rest = columns - column, rest_lines = (rest + kDepth - 1) / kDepth;
  std::byte block[kLines * kLineBytes] = {};
  std::memcpy(block, lines, rest_lines * kLineBytes - kLineBytes / 2);
  std::byte values[kHalfRows * kColumns * sizeof(float)];
  decode_block<qtype, bits, type>(block, scale, shift, begin, end, {values, kColumns}, 0);
  const std::int64_t size = size_of(type);
  for (std::int64_t r = 0; r < end - begin; ++r) {
    std::memcpy(static_cast<std::byte*>(out.y) + (index + r * out.stride + column) * size,
                values + r * kColumns * size, rest * size);
  }
}

// Rows [begin, end) of the weight, all of one half of a tile; out.y has row `first_row` first.
template <QTypeId qtype, int bits, FloatType type>
void decode_half(const PackedLayout& layout, const std::byte* weight, std::int64_t first_row,
                 std::int64_t begin, std::int64_t end, const Output& out) {
  const std::int64_t half_row = begin / kHalfRows * kHalfRows;
  const int half = static_cast<int>(half_row / kHalfRows % 2);
  const std::byte* tile = weight + begin / PackedLayout::kTileRows * layout.tile_bytes();
  for (std::int64_t group = 0; group < layout.groups(); ++group) {
    const HalfScales scales(layout, tile, group, half);
    const std::byte* lines = tile + layout.group_offset(group) + half * (kLineBytes / 2);
    decode_group<qtype, bits, type>(lines, layout.group_columns(group), scales, begin - half_row,
                                    end - half_row, out,
                                    (begin - first_row) * out.stride + layout.group_begin(group));
  }
}

/// Arguments of a call.
struct Range {
  const PackedLayout& layout;
  const std::byte* weight;
  std::int64_t first_row, begin, end;
  FloatType type;
  void* y;
};

template <QTypeId qtype, int bits, FloatType type>
void decode_rows(const Range& range) {
  const Output out{range.y, range.layout.spec().columns};
  for (std::int64_t row = range.begin; row < range.end;) {
    const std::int64_t stop = std::min(range.end, (row / kHalfRows + 1) * kHalfRows);
    decode_half<qtype, bits, type>(range.layout, range.weight, range.first_row, row, stop, out);
    row = stop;
  }
}

template <QTypeId qtype, int bits>
void decode_range(const Range& range) {
  switch (range.type) {
    case FloatType::kF32:
      return decode_rows<qtype, bits, FloatType::kF32>(range);
    case FloatType::kBF16:
      return decode_rows<qtype, bits, FloatType::kBF16>(range);
    case FloatType::kF16:
      return decode_rows<qtype, bits, FloatType::kF16>(range);
  }
}

}  // namespace

void dequantize_range__avx2(const PackedLayout& layout, const std::byte* weight,
                            std::int64_t first_row, std::int64_t begin, std::int64_t end,
                            FloatType type, void* y) {
  const Range range{layout, weight, first_row, begin, end, type, y};
  switch (layout.spec().qtype) {
    case QTypeId::kInt2:
      return decode_range<QTypeId::kInt2, 2>(range);
    case QTypeId::kInt4:
      return decode_range<QTypeId::kInt4, 4>(range);
    case QTypeId::kInt8:
      return decode_range<QTypeId::kInt8, 8>(range);
    case QTypeId::kFloat8E4M3FN:
      return decode_range<QTypeId::kFloat8E4M3FN, 8>(range);
    case QTypeId::kFloat8E4M3FNUZ:
      return decode_range<QTypeId::kFloat8E4M3FNUZ, 8>(range);
    case QTypeId::kFloat8E5M2:
      return decode_range<QTypeId::kFloat8E5M2, 8>(range);
  }
}

}  // namespace quantal::kernels

#pragma GCC pop_options
