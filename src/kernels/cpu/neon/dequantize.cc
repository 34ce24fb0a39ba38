// Dequantizing ranges of rows for NEON: the numbers of the portable reading. Four lines of four
// rows are transposed, which leaves 16 or more consecutive columns of a row in a register.
#include <algorithm>

#include "kernels/cpu/neon/numbers.h"
#include "kernels/cpu/neon/rows.h"
#include "kernels/linear.h"

namespace quantal::kernels {
namespace {

constexpr int kLines = 4;

// words[line] has a word of every row; afterwards words[row] has one of every line.
inline void transpose(uint32x4_t (&words)[kLines]) {
  const uint64x2_t even_low = vreinterpretq_u64_u32(vtrn1q_u32(words[0], words[1]));
  const uint64x2_t odd_low = vreinterpretq_u64_u32(vtrn2q_u32(words[0], words[1]));
  const uint64x2_t even_high = vreinterpretq_u64_u32(vtrn1q_u32(words[2], words[3]));
  const uint64x2_t odd_high = vreinterpretq_u64_u32(vtrn2q_u32(words[2], words[3]));
  words[0] = vreinterpretq_u32_u64(vtrn1q_u64(even_low, even_high));
  words[1] = vreinterpretq_u32_u64(vtrn1q_u64(odd_low, odd_high));
  words[2] = vreinterpretq_u32_u64(vtrn2q_u64(even_low, even_high));
  words[3] = vreinterpretq_u32_u64(vtrn2q_u64(odd_low, odd_high));
}

// Takes a row's words of four lines apart: bytes[i] has columns [16 i, 16 i + 16) as stored codes.
template <int bits>
inline void split(uint32x4_t words, uint8x16_t (&bytes)[8 / bits]) {
  const uint8x16_t mask = vdupq_n_u8(static_cast<std::uint8_t>((1 << bits) - 1));
  const uint8x16_t codes = vreinterpretq_u8_u32(words);
  if constexpr (bits == 8) {
    bytes[0] = codes;
  } else if constexpr (bits == 4) {
    const uint32x4_t low = vreinterpretq_u32_u8(vandq_u8(codes, mask));
    const uint32x4_t high = vreinterpretq_u32_u8(vshrq_n_u8(codes, 4));
    bytes[0] = vreinterpretq_u8_u32(vzip1q_u32(low, high));
    bytes[1] = vreinterpretq_u8_u32(vzip2q_u32(low, high));
  } else {
    // Planes of four columns; a line is one word of each.
    uint32x4x4_t planes;
    for_constants<4>([&](auto p) __attribute__((always_inline)) {
      uint8x16_t plane = codes;
      if constexpr (p > 0) plane = vshrq_n_u8(codes, 2 * p);
      planes.val[p] = vreinterpretq_u32_u8(vandq_u8(plane, mask));
    });
    uint32x4_t lines[kLines] = {planes.val[0], planes.val[1], planes.val[2], planes.val[3]};
    transpose(lines);
    QUANTAL_UNROLL for (int i = 0; i < kLines; ++i) bytes[i] = vreinterpretq_u8_u32(lines[i]);
  }
}

struct Output {
  FloatType type;
  void* y;
  std::int64_t columns;
  std::int64_t first_row;  ///< of the weight, at y
};

// Part of one group of the weight: 4 rows of a tile, of which [begin, end) are wanted.
struct Part {
  const std::byte* lines;
  std::int64_t columns;
  std::int64_t begin, end;
  const float* scale;
  const float* shift;
  std::int64_t index;  ///< of the first row's first column, at y
};

// Whole blocks of four lines; returns how many columns.
template <QTypeId qtype, int bits>
std::int64_t decode_part(const Part& part, const Output& out) {
  constexpr std::int64_t kColumns = kLines * 32 / bits;
  const std::byte* lines = part.lines;
  std::int64_t column = 0;
  for (; column + kColumns <= part.columns; column += kColumns, lines += kLines * kLineBytes) {
    uint32x4_t words[kLines];
    QUANTAL_UNROLL for (int i = 0; i < kLines; ++i) {
      words[i] = vreinterpretq_u32_u8(load_quarter(lines + i * kLineBytes));
    }
    transpose(words);
    QUANTAL_UNROLL for (int r = 0; r < kQuarterRows; ++r) {
      if (r < part.begin || r >= part.end) continue;
      uint8x16_t bytes[8 / bits];
      split<bits>(words[r], bytes);
      const float32x4_t shift = vdupq_n_f32(part.shift[r]);
      std::int64_t to = part.index + (r - part.begin) * out.columns + column;
      QUANTAL_UNROLL for (int i = 0; i < 8 / bits; ++i) {
        float32x4_t values[4];
        // int8 is packed as code + 128.
        numbers<qtype>(veorq_u8(bytes[i], vdupq_n_u8(qtype == QTypeId::kInt8 ? 0x80 : 0)), values);
        for (const float32x4_t value : values) {
          // Two roundings, as in the portable reading.
          store_numbers(out.y, to, out.type, vsubq_f32(vmulq_n_f32(value, part.scale[r]), shift));
          to += kQuarterRows;
        }
      }
    }
  }
  return column;
}

// Rows [begin, end) of the weight, all of one quarter of a tile.
template <QTypeId qtype, int bits>
void decode_quarter(const PackedLayout& layout, const std::byte* weight, std::int64_t begin,
                    std::int64_t end, const Output& out) {
  const std::int64_t first_row = begin / kQuarterRows * kQuarterRows;
  const std::int64_t quarter = first_row % PackedLayout::kTileRows / kQuarterRows;
  const std::byte* tile = weight + begin / PackedLayout::kTileRows * layout.tile_bytes();
  for (std::int64_t group = 0; group < layout.groups(); ++group) {
    const GroupScales scales = load_scales(layout, tile, group);
    const std::int64_t columns = layout.group_columns(group);
    const std::int64_t index = (begin - out.first_row) * out.columns + layout.group_begin(group);
    const std::int64_t done = decode_part<qtype, bits>(
        {tile + layout.group_offset(group) + quarter * kQuarterBytes, columns, begin - first_row,
         end - first_row, scales.scale + quarter * kQuarterRows,
         scales.shift + quarter * kQuarterRows, index},
        out);
    for (std::int64_t row = begin; row < end && done < columns; ++row) {
      dequantize_part(layout, weight, row, group, done, out.type, out.y,
                      index + (row - begin) * out.columns + done);
    }
  }
}

template <QTypeId qtype, int bits>
void decode_range(const PackedLayout& layout, const std::byte* weight, std::int64_t begin,
                  std::int64_t end, const Output& out) {
  for (std::int64_t row = begin; row < end;) {
    const std::int64_t stop = std::min(end, (row / kQuarterRows + 1) * kQuarterRows);
    decode_quarter<qtype, bits>(layout, weight, row, stop, out);
    row = stop;
  }
}

}  // namespace

void dequantize_range__neon(const PackedLayout& layout, const std::byte* weight,
                            std::int64_t first_row, std::int64_t begin, std::int64_t end,
                            FloatType type, void* y) {
  const Output out{type, y, layout.spec().columns, first_row};
  switch (layout.spec().qtype) {
    case QTypeId::kInt2:
      return decode_range<QTypeId::kInt2, 2>(layout, weight, begin, end, out);
    case QTypeId::kInt4:
      return decode_range<QTypeId::kInt4, 4>(layout, weight, begin, end, out);
    case QTypeId::kInt8:
      return decode_range<QTypeId::kInt8, 8>(layout, weight, begin, end, out);
    case QTypeId::kFloat8E4M3FN:
      return decode_range<QTypeId::kFloat8E4M3FN, 8>(layout, weight, begin, end, out);
    case QTypeId::kFloat8E4M3FNUZ:
      return decode_range<QTypeId::kFloat8E4M3FNUZ, 8>(layout, weight, begin, end, out);
    case QTypeId::kFloat8E5M2:
      return decode_range<QTypeId::kFloat8E5M2, 8>(layout, weight, begin, end, out);
  }
}

}  // namespace quantal::kernels
