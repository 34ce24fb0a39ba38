// Integer convolutions in groups of few channels: fp32 holds their codes and sums exactly.
#include <algorithm>
#include <cstring>

#include "kernels/grouped_conv.h"
#include "kernels/integer_conv.h"
#include "kernels/linear.h"
#include "kernels/scratch.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kTileRows = PackedLayout::kTileRows;

// Up to so many rows of a group, or columns, patches and their products in tiles of 16 rows take
// longer on AVX2.
struct Few {
  std::int64_t rows, columns;
};
constexpr Few kFewInPlanes{16, 48}, kFewInPixels{16, 24};
constexpr std::int64_t kFewPositions = 5;

// A packed weight of one group a row, unpacked.
class FloatCodes {
 public:
  explicit FloatCodes(const IntegerConvArgs& args)
      : rows_(args.shape.rows),
        columns_(args.shape.columns()),
        codes_(rows_ * columns_),
        scale_(rows_),
        shift_(rows_),
        is_affine_(args.layout->is_affine()) {
    const PackedLayout& layout = *args.layout;
    for (std::int64_t first = 0; first < rows_; first += kTileRows) {
      const std::byte* tile = args.weight + first / kTileRows * layout.tile_bytes();
      const std::int64_t rows = std::min(kTileRows, rows_ - first);
      unpack_tile(layout, tile, rows, codes_.data() + first * columns_);
      const GroupScales scales = load_scales(layout, tile, 0);
      std::copy_n(scales.scale, rows, scale_.data() + first);
      std::copy_n(scales.shift, rows, shift_.data() + first);
    }
  }

  const float* codes() const { return codes_.data(); }
  const float* scale() const { return scale_.data(); }
  const float* shift() const { return is_affine_ ? shift_.data() : nullptr; }

 private:
  void unpack_tile(const PackedLayout& layout, const std::byte* tile, std::int64_t rows,
                   float* to) const {
    const std::int64_t depth = layout.depth();
    const auto bits = static_cast<int>(32 / depth);
    const std::uint32_t mask = (1U << bits) - 1;
    const int zero = is_affine_ ? 0 : 128;
    for (std::int64_t c = 0; c < columns_; ++c) {
      const std::byte* line = tile + c / depth * PackedLayout::kLineBytes;
      const int shift = bit_of(bits, static_cast<int>(c % depth));
      for (std::int64_t r = 0; r < rows; ++r) {
        std::uint32_t word;
        std::memcpy(&word, line + r * 4, sizeof(word));
        to[r * columns_ + c] = static_cast<float>(static_cast<int>(word >> shift & mask) - zero);
      }
    }
  }

  std::int64_t rows_, columns_;
  Scratch codes_, scale_, shift_;
  bool is_affine_;
};

}  // namespace

bool has_grouped(Isa isa, const ConvShape& shape, const PackedLayout& layout, ChannelOrder order) {
  if (layout.groups() != 1 || shape.columns() > GroupedConvArgs::kMostCodes ||
      find_grouped_conv(isa, shape, order) == nullptr) {
    return false;
  }
  if (shape.is_depthwise()) return true;
  // Fewer positions of a line leave most of a register empty; patches of one group have them all.
  if (shape.groups == 1 && shape.output()[2] < kFewPositions) return false;
  Few few = order == ChannelOrder::kPlanes ? kFewInPlanes : kFewInPixels;
  const bool sums_x_apart = order == ChannelOrder::kLast && layout.is_affine();
  // Products of codes take half the time, or less, on what has more than AVX2.
  if (sums_x_apart || isa != Isa::kAvx2) few = {few.rows / 2, few.columns / 2};
  return shape.group_rows() <= few.rows || shape.columns() <= few.columns;
}

bool conv_grouped(Isa isa, const IntegerConvArgs& args, const ParallelFor& parallel_for) {
  const FloatCodes weight(args);
  const ConvScales scales{
      .x = args.scales, .scale = weight.scale(), .shift = weight.shift(), .y = args.y_scale};
  return grouped_conv(isa,
                      {.shape = args.shape,
                       .weight = weight.codes(),
                       .type = args.type,
                       .order = args.order,
                       .x = args.codes,
                       .y = args.y,
                       .bias = args.bias,
                       .scales = &scales},
                      parallel_for);
}

}  // namespace quantal::kernels
