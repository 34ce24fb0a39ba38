#include "kernels/linear.h"

#include <algorithm>

namespace quantal::kernels {
namespace {

// fp16 saturates, as dequantizing the canonical form does.
float in_range(float value, FloatType type) {
  return type == FloatType::kF16 ? std::clamp(value, -65504.0F, 65504.0F) : value;
}

void dequantize_row(const PackedLayout& layout, const std::byte* weight, std::int64_t row,
                    FloatType type, void* y, std::int64_t y_row) {
  const std::byte* tile = weight + row / PackedLayout::kTileRows * layout.tile_bytes();
  const auto r = row % PackedLayout::kTileRows;
  for (std::int64_t group = 0; group < layout.groups(); ++group) {
    const GroupScales scales = load_scales(layout, tile, group);
    const std::int64_t first = layout.group_begin(group);
    for (std::int64_t c = first; c < first + layout.group_columns(group); ++c) {
      const float code = code_value(layout.spec().qtype, packed_code(layout, weight, row, c));
      const float value = code * scales.scale[r] - scales.shift[r];
      store_float(y, y_row * layout.spec().columns + c, type, in_range(value, type));
    }
  }
}

}  // namespace

LinearKernel find_linear(Isa isa, const WeightSpec&) {
  switch (isa) {
    case Isa::kAvx2:
#if defined(__x86_64__)
      return linear__avx2;
#else
      return nullptr;
#endif
    case Isa::kPortable:
      return linear__portable;
  }
  return nullptr;
}

GroupScales load_scales(const PackedLayout& layout, const std::byte* tile, std::int64_t group) {
  const std::byte* scales =
      tile + layout.group_offset(group) + layout.group_lines(group) * PackedLayout::kLineBytes;
  GroupScales out;
  for (int r = 0; r < PackedLayout::kTileRows; ++r) {
    const FloatType type = layout.spec().scale_type;
    out.scale[r] = load_float(scales, r, type);
    out.shift[r] =
        layout.is_affine() ? load_float(scales, PackedLayout::kTileRows + r, type) : 0.0F;
  }
  return out;
}

float code_value(QTypeId qtype, std::uint8_t packed) {
  switch (qtype) {
    case QTypeId::kInt2:
    case QTypeId::kInt4:
      return packed;
    case QTypeId::kInt8:
      return static_cast<float>(static_cast<int>(packed) - 128);
    case QTypeId::kFloat8E4M3FN:
      return e4m3fn_value(packed);
    case QTypeId::kFloat8E4M3FNUZ:
      return e4m3fnuz_value(packed);
    case QTypeId::kFloat8E5M2:
      return e5m2_value(packed);
  }
  return 0;
}

void dequantize_rows(const PackedLayout& layout, const std::byte* weight,
                     const std::int64_t* indices, std::int64_t count, FloatType type, void* y,
                     const ParallelFor& parallel_for) {
  parallel_for(count, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i)
      dequantize_row(layout, weight, indices[i], type, y, i);
  });
}

}  // namespace quantal::kernels
