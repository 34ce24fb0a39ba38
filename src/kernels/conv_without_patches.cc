// Integer convolutions in groups of few channels: fp32 holds their codes and sums exactly.
#include <cmath>

#include "kernels/grouped_conv.h"
#include "kernels/integer_conv.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kTileRows = PackedLayout::kTileRows;

// Nanoseconds a position of one group takes, fitted to 30 layers on one core with AVX2 (Zen 4): of
// patches, whose products are of tiles of 16 rows, and without.
struct Costs {
  float position, column;   // of patches: to be written, and their results
  float tile, tile_column;  // of their products
  float product, row;       // without: products, and results
  float channel, line;      // and to copy a channel, and a line of one
};
constexpr Costs kPlanes{15, 0.34F, 21, 0.2F, 0.0245F, 0.17F, 0, 10};
constexpr Costs kAffinePlanes{13, 0.26F, 19, 0.135F, 0.028F, 0.17F, 0, 10};
constexpr Costs kPixels{15, 0.18F, 15, 0.2F, 0.03F, 0, 0.22F, 0};
constexpr Costs kAffinePixels{11, 0.11F, 13, 0.137F, 0.033F, 0, 0.22F, 0};
// The products on what has more than AVX2: not measured.
constexpr float kOtherProducts = 0.5F;

bool patches_take_longer(Isa isa, const ConvShape& shape, bool is_affine, ChannelOrder order) {
  const bool is_planes = order == ChannelOrder::kPlanes;
  const Costs& costs =
      is_planes ? (is_affine ? kAffinePlanes : kPlanes) : (is_affine ? kAffinePixels : kPixels);
  const auto rows = static_cast<float>(shape.group_rows());
  const auto columns = static_cast<float>(shape.columns());
  const auto channels = static_cast<float>(shape.group_channels());
  const auto width = static_cast<float>(shape.output()[2]);
  const float products = isa == Isa::kAvx2 ? 1 : kOtherProducts;
  const float patches =
      costs.position + columns * costs.column +
      products * std::ceil(rows / kTileRows) * (costs.tile + columns * costs.tile_column);
  // A register has 8 positions of a line, whether there are or not.
  const float used = std::ceil(width / 8) * 8 / width;
  const float grouped = used * rows * (columns * costs.product + costs.row) +
                        channels * (costs.channel + costs.line / width);
  return patches > grouped;
}

}  // namespace

bool goes_without_patches(Isa isa, const ConvShape& shape, const PackedLayout& layout,
                          ChannelOrder order) {
  if (layout.groups() != 1 || shape.columns() > GroupedConvArgs::kMostCodes ||
      find_grouped_conv(isa, shape, order) == nullptr) {
    return false;
  }
  return shape.is_depthwise() || patches_take_longer(isa, shape, layout.is_affine(), order);
}

bool conv_without_patches(Isa isa, const IntegerConvArgs& args, const ParallelFor& parallel_for) {
  const ConvCodes codes{.layout = args.layout,
                        .weight = args.weight,
                        .x_scales = args.scales,
                        .y_scale = args.y_scale};
  return grouped_conv(isa,
                      {.shape = args.shape,
                       .type = args.type,
                       .order = args.order,
                       .x = args.codes,
                       .y = args.y,
                       .bias = args.bias,
                       .codes = &codes},
                      parallel_for);
}

}  // namespace quantal::kernels
