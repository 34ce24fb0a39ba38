#include <algorithm>
#include <array>
#include <vector>

#include "kernels/linear.h"
#include "kernels/variants.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kTileRows = PackedLayout::kTileRows;
constexpr std::int64_t kLineBytes = PackedLayout::kLineBytes;

// The values of all packed codes of a type.
using Values = std::array<float, 256>;
Values values_of(QTypeId qtype) {
  Values values;
  for (int code = 0; code < 256; ++code) {
    values[code] = code_value(qtype, static_cast<std::uint8_t>(code));
  }
  return values;
}

// fp16 saturates, as dequantizing the canonical form does.
float in_range(float value, FloatType type) {
  return type == FloatType::kF16 ? std::clamp(value, -65504.0F, 65504.0F) : value;
}

// One row of a group: its word of every line becomes `columns` numbers.
template <int bits>
void decode_words(const std::byte* lines, std::int64_t columns, const Values& values, float scale,
                  float shift, float* out) {
  constexpr int kDepth = 32 / bits;
  constexpr std::uint32_t kMask = (1U << bits) - 1;
  for (std::int64_t first = 0; first < columns; first += kDepth, lines += kLineBytes) {
    std::uint32_t word;
    std::memcpy(&word, lines, sizeof(word));
    const auto count = static_cast<int>(std::min<std::int64_t>(kDepth, columns - first));
    for (int j = 0; j < count; ++j) {
      out[first + j] = values[word >> bit_of(bits, j) & kMask] * scale - shift;
    }
  }
}

void decode_row(const PackedLayout& layout, const std::byte* weight, const Values& values,
                std::int64_t row, float* out) {
  const std::byte* tile = weight + row / kTileRows * layout.tile_bytes();
  const auto r = row % kTileRows;
  for (std::int64_t group = 0; group < layout.groups(); ++group) {
    const std::byte* lines = tile + layout.group_offset(group);
    const std::byte* scales = lines + layout.group_lines(group) * kLineBytes;
    const FloatType type = layout.spec().scale_type;
    const float scale = load_float(scales, r, type);
    const float shift = layout.is_affine() ? load_float(scales, kTileRows + r, type) : 0.0F;
    float* to = out + layout.group_begin(group);
    const std::int64_t columns = layout.group_columns(group);
    switch (layout.depth()) {
      case 16:
        decode_words<2>(lines + r * 4, columns, values, scale, shift, to);
        break;
      case 8:
        decode_words<4>(lines + r * 4, columns, values, scale, shift, to);
        break;
      default:
        decode_words<8>(lines + r * 4, columns, values, scale, shift, to);
    }
  }
}

// Row number i of y is row row_of(i) of the weight.
template <typename RowOf>
void decode(const PackedLayout& layout, const std::byte* weight, std::int64_t count,
            const RowOf& row_of, FloatType type, void* y, const ParallelFor& parallel_for) {
  const Values values = values_of(layout.spec().qtype);
  const std::int64_t columns = layout.spec().columns;
  parallel_for(count, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> row(type == FloatType::kF32 ? 0 : columns);
    for (std::int64_t i = begin; i < end; ++i) {
      if (type == FloatType::kF32) {
        decode_row(layout, weight, values, row_of(i), static_cast<float*>(y) + i * columns);
        continue;
      }
      decode_row(layout, weight, values, row_of(i), row.data());
      for (float& value : row) value = in_range(value, type);
      store_floats(y, i * columns, type, row.data(), columns);
    }
  });
}

}  // namespace

void dequantize_rows(const PackedLayout& layout, const std::byte* weight,
                     const std::int64_t* indices, std::int64_t count, FloatType type, void* y,
                     const ParallelFor& parallel_for) {
  decode(layout, weight, count, [&](std::int64_t i) { return indices[i]; }, type, y, parallel_for);
}

DequantizeRange find_dequantize_range(Isa isa) {
  return best_variant<DequantizeRange>(isa, {
#if defined(__x86_64__)
                                                {Isa::kAvx2, dequantize_range__avx2},
#elif defined(__aarch64__)
                                                {Isa::kNeon, dequantize_range__neon},
#endif
                                                {Isa::kPortable, dequantize_range__portable}});
}

void dequantize_range(Isa isa, const PackedLayout& layout, const std::byte* weight,
                      std::int64_t begin, std::int64_t count, FloatType type, void* y,
                      const ParallelFor& parallel_for) {
  const DequantizeRange dequantize = find_dequantize_range(isa);
  parallel_for(count, [&](std::int64_t from, std::int64_t to) {
    dequantize(layout, weight, begin, begin + from, begin + to, type, y);
  });
}

void dequantize_range__portable(const PackedLayout& layout, const std::byte* weight,
                                std::int64_t first_row, std::int64_t begin, std::int64_t end,
                                FloatType type, void* y) {
  std::byte* to =
      static_cast<std::byte*>(y) + (begin - first_row) * layout.spec().columns * size_of(type);
  decode(
      layout, weight, end - begin, [&](std::int64_t i) { return begin + i; }, type, to, serial_for);
}

void dequantize_part(const PackedLayout& layout, const std::byte* weight, std::int64_t row,
                     std::int64_t group, std::int64_t first, FloatType type, void* y,
                     std::int64_t index) {
  const std::byte* tile = weight + row / kTileRows * layout.tile_bytes();
  const std::byte* scales =
      tile + layout.group_offset(group) + layout.group_lines(group) * kLineBytes;
  const auto r = row % kTileRows;
  const float scale = load_float(scales, r, layout.spec().scale_type);
  const float shift =
      layout.is_affine() ? load_float(scales, kTileRows + r, layout.spec().scale_type) : 0.0F;
  for (std::int64_t c = first; c < layout.group_columns(group); ++c) {
    const std::uint8_t code = packed_code(layout, weight, row, layout.group_begin(group) + c);
    const float value = code_value(layout.spec().qtype, code) * scale - shift;
    store_float(y, index + c - first, type, in_range(value, type));
  }
}

}  // namespace quantal::kernels
