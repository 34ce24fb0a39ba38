// The plain reading of the definition: complete, on every processor, and what the tuned kernels are
// compared with, bit for bit.
#include "kernels/integer_linear.h"

#include <algorithm>
#include <cmath>

#include "kernels/linear.h"

namespace quantal::kernels {
namespace {

int integer_code(QTypeId qtype, std::uint8_t packed) {
  return qtype == QTypeId::kInt8 ? static_cast<int>(packed) - 128 : packed;
}

// Σ code_w·code_x of one block of a group, for one row.
std::int32_t dot(const IntegerLinearArgs& args, std::int64_t row, std::int64_t group,
                 std::int64_t begin, std::int64_t end, const std::int8_t* codes) {
  const PackedLayout& layout = *args.layout;
  std::int32_t sum = 0;
  for (std::int64_t c = begin; c < end; ++c) {
    const std::uint8_t packed =
        packed_code(layout, args.weight, row, layout.group_begin(group) + c);
    sum += integer_code(layout.spec().qtype, packed) * codes[c];
  }
  return sum;
}

float row_sum(const IntegerLinearArgs& args, const TokenCodes& x, std::int64_t row,
              std::int64_t token) {
  const PackedLayout& layout = *args.layout;
  const std::byte* tile = args.weight + row / PackedLayout::kTileRows * layout.tile_bytes();
  const auto r = row % PackedLayout::kTileRows;
  const std::int32_t* x_sum = x.sums(token);
  float sum = 0;
  for (std::int64_t group = 0; group < layout.groups(); ++group) {
    const GroupScales scales = load_scales(layout, tile, group);
    const std::int8_t* codes = x.codes(token) + layout.padded_begin(group);
    const std::int64_t columns = layout.group_columns(group);
    for (std::int64_t block = 0; block < x.blocks_per_group(); ++block) {
      const std::int64_t begin = std::min(columns, block * kBlockColumns);
      const std::int64_t end = std::min(columns, begin + kBlockColumns);
      const std::int32_t total = dot(args, row, group, begin, end, codes);
      sum = std::fma(static_cast<float>(total), scales.scale[r], sum);
      if (layout.is_affine()) {
        sum = std::fma(static_cast<float>(*x_sum), -scales.shift[r], sum);
      }
      ++x_sum;
    }
  }
  return sum;
}

}  // namespace

void integer_linear__portable(const IntegerLinearArgs& args, const ParallelFor& parallel_for) {
  const PackedLayout& layout = *args.layout;
  const TokenCodes x(layout, args.source.tokens);
  parallel_for(args.source.tokens, [&](std::int64_t begin, std::int64_t end) {
    quantize_tokens__portable(layout, args.source, begin, end, x);
  });
  parallel_for(layout.spec().rows, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const float bias = args.bias != nullptr ? load_float(args.bias, row, args.type) : 0.0F;
      for (std::int64_t token = 0; token < args.source.tokens; ++token) {
        const float y = std::fma(row_sum(args, x, row, token), x.scale(token), bias);
        store_float(args.y, token * args.y_stride + row, args.type, y);
      }
    }
  });
}

}  // namespace quantal::kernels
