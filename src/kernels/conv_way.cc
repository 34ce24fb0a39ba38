#include "kernels/conv_way.h"

#include <algorithm>

#include "kernels/canonical_linear.h"
#include "kernels/cpu/detect.h"
#include "kernels/grouped_conv.h"
#include "kernels/integer_conv.h"
#include "kernels/tap_conv.h"

namespace quantal::kernels {
namespace {

// Rows of a group from which on products of codes make up for writing patches; below, rounding the
// input and ATen's float convolution take less time.
constexpr std::int64_t kIntegerRows = 64;
// And where no patches are written, with products of bytes as fast as those of VNNI.
constexpr std::int64_t kTapRows = 16, kTapChannels = 16;

/// A convolution, and the numbers that decide.
struct Problem {
  Problem(Isa isa, const ConvShape& conv, ChannelOrder order, FloatType float_type)
      : shape(conv),
        type(float_type),
        is_planes(order == ChannelOrder::kPlanes),
        positions(conv.batch * conv.positions()),
        weight(conv.rows * conv.columns()),
        products(positions * weight),
        takes_grouped(find_grouped_conv(isa, conv, order) != nullptr) {}

  /// Groups of up to so many channels and rows.
  bool is_thin(std::int64_t most) const {
    return std::max(shape.group_rows(), shape.group_channels()) <= most;
  }

  const ConvShape& shape;
  FloatType type;
  bool is_planes;
  std::int64_t positions, weight, products;
  bool takes_grouped;
};

/// Where no kernel reads input and codes where they lie, or none that was measured.
ConvWay plain_way(const Problem& p) {
  // With so many positions, or so small a weight, dequantizing it takes less than a twentieth of a
  // float convolution's time.
  constexpr std::int64_t kFewPositions = 128, kLargeWeight = 1 << 15;
  const bool gains = p.positions <= kFewPositions && p.weight >= kLargeWeight;
  return p.shape.groups == 1 && gains ? ConvWay::kPatches : ConvWay::kAten;
}

namespace avx2 {

bool has_few_columns(const Problem& p) {
  constexpr std::int64_t kColumns = 160, kWeight = 1 << 14;
  // Channels-last pixels suit ATen's products of one tap.
  constexpr std::int64_t kTapProducts = 1 << 23;
  return p.takes_grouped && p.shape.columns() <= kColumns && p.weight <= kWeight &&
         (p.is_planes || p.shape.taps() > 1 || p.products <= kTapProducts);
}

ConvWay ungrouped_way(const Problem& p) {
  // Elements of the weight for each position, from which on not to dequantize gains more than the
  // products lose to ATen's; and products that take less time than ATen's call.
  constexpr std::int64_t kShare = 64, kProducts = 1 << 22;
  if (p.weight >= kShare * p.positions || p.products <= kProducts) return ConvWay::kDirect;
  return has_few_columns(p) ? ConvWay::kGrouped : ConvWay::kAten;
}

ConvWay grouped_way(const Problem& p) {
  // Beyond many products ATen reads its input fewer times; few take less time than its call.
  constexpr std::int64_t kMany = 1 << 26, kFew = 1 << 18, kDirectColumns = 64;
  const bool is_many = p.products > kMany;
  const bool gains = p.is_thin(p.is_planes || !is_many ? 8 : 4) || p.products <= kFew;
  if (gains && p.takes_grouped) return ConvWay::kGrouped;
  if (takes_groups(p.shape) && p.shape.columns() >= kDirectColumns && !is_many) {
    return ConvWay::kDirect;
  }
  return p.is_planes && has_few_columns(p) ? ConvWay::kGrouped : ConvWay::kAten;
}

}  // namespace avx2

namespace avx512 {

// Whether torch multiplies such numbers at half the speed of fp32.
bool has_slow_halves(const Problem& p) {
  return p.type == FloatType::kF16 || (p.type == FloatType::kBF16 && !multiplies_bf16_fast());
}

ConvWay ungrouped_way(const Problem& p) {
  constexpr std::int64_t kThinWeight = 1 << 12, kThinPixels = 48;
  // Up to so many positions, and from so many elements of the weight on, dequantizing takes longer
  // than the products lose to ATen's; over pixels of one tap those lose more.
  constexpr std::int64_t kPositions = 800, kTapPositions = 256, kLargeWeight = 1 << 20;
  // And so few products take less time than ATen's call.
  constexpr std::int64_t kFew = 1 << 18;
  const bool is_tap = p.shape.taps() == 1;
  if (p.products <= kFew) return ConvWay::kDirect;
  if (is_tap && p.is_planes) {
    return p.weight <= kThinWeight && p.takes_grouped ? ConvWay::kGrouped : ConvWay::kDirect;
  }
  if (is_tap && p.shape.columns() < kThinPixels) return ConvWay::kAten;
  const bool gains = has_slow_halves(p) || p.weight > kLargeWeight ||
                     p.positions <= (is_tap ? kTapPositions : kPositions);
  return gains ? ConvWay::kDirect : ConvWay::kAten;
}

ConvWay grouped_way(const Problem& p) {
  constexpr std::int64_t kMany = 1 << 26, kFew = 1 << 18, kFewTileProducts = 1 << 23;
  constexpr std::int64_t kDirectColumns = 64;
  const bool is_half = has_slow_halves(p);
  const bool is_depthwise = p.is_thin(1);
  const bool gains = p.products <= kFew || (p.is_planes    ? p.is_thin(8)
                                            : is_depthwise ? !is_half
                                                           : is_half && p.is_thin(4));
  if (gains && p.takes_grouped) return ConvWay::kGrouped;
  // Groups of one tile of rows leave half of the kernel's registers unused.
  const bool is_direct = takes_groups(p.shape) && p.shape.columns() >= kDirectColumns &&
                         p.products <= kMany &&
                         (is_half || p.shape.group_rows() > 16 || p.products <= kFewTileProducts);
  return is_direct ? ConvWay::kDirect : ConvWay::kAten;
}

}  // namespace avx512

bool has_wide_registers(Isa isa) { return find_float_conv(isa) != find_float_conv(Isa::kAvx2); }

}  // namespace

ConvWay conv_way(Isa isa, const ConvShape& shape, ChannelOrder order, FloatType type) {
  if (isa == Isa::kPortable) return ConvWay::kAten;
  const Problem p(isa, shape, order, type);
  // torch's products of bf16 are twice as fast as the kernel's of fp32.
  const bool is_fast_bf16 = isa == Isa::kAvx512Bf16 && type == FloatType::kBF16;
  if (find_float_conv(isa) == nullptr || is_fast_bf16) return plain_way(p);
  if (shape.groups == 1 && p.positions <= kFewCanonicalTokens) return ConvWay::kPatches;
  if (has_wide_registers(isa)) {
    return shape.groups == 1 ? avx512::ungrouped_way(p) : avx512::grouped_way(p);
  }
  return shape.groups == 1 ? avx2::ungrouped_way(p) : avx2::grouped_way(p);
}

bool gains_from_codes(Isa isa, const ConvShape& shape, const PackedLayout& layout) {
  if (shape.group_rows() >= kIntegerRows) return true;
  const TapConvKernel* taps = find_tap_conv(isa, shape, layout);
  if (taps != nullptr && !taps->is_wide && shape.group_rows() >= kTapRows &&
      shape.group_channels() >= kTapChannels) {
    return true;
  }
  // Elsewhere it was not measured beside ATen.
  if (find_grouped_conv(isa, {}, ChannelOrder::kPlanes) == nullptr) return false;
  // In one order or the other, so that both round the same.
  return goes_without_patches(isa, shape, layout, ChannelOrder::kPlanes) ||
         goes_without_patches(isa, shape, layout, ChannelOrder::kLast);
}

}  // namespace quantal::kernels
