#pragma once

#include <vector>

#include <quantal/isa.h>

#include "kernels/conv_patches.h"
#include "kernels/scratch.h"

/// Convolution of floats with a packed weight: the linear of linear.h over what the kernel covers
/// at each position, which is read where it lies. Neither the weight's float value nor patches are
/// ever written.
namespace quantal::kernels {

/// Arguments of a convolution. Checked by the caller: kernels trust them.
struct FloatConvArgs {
  ConvShape shape;  ///< takes_groups(shape)
  /// (rows, shape.columns()): all rows, or those from `first_row` on, with `y` and `bias` where
  /// they begin.
  const PackedLayout* layout = nullptr;
  std::int64_t first_row = 0;
  const std::byte* weight = nullptr;
  FloatType type = FloatType::kF32;            ///< of x, y and bias
  ChannelOrder order = ChannelOrder::kPlanes;  ///< of x and y
  const void* x = nullptr;                     ///< (batch, channels, pixels), or in the other order
  void* y = nullptr;           ///< (batch, shape.rows, positions), or in the other order
  const void* bias = nullptr;  ///< (rows), or null

  /// Elements from one row to the next in y.
  std::int64_t y_row_stride() const {
    return order == ChannelOrder::kPlanes ? shape.positions() : 1;
  }
};

/// Whether no tile of rows has rows of two groups.
inline bool takes_groups(const ConvShape& shape) {
  return shape.groups == 1 || shape.group_rows() % PackedLayout::kTileRows == 0;
}

/// The least stride of `least` floats or more at which `count` numbers take half of the first-level
/// cache at most, rather than a few of its sets.
std::int64_t spread_stride(std::int64_t least, std::int64_t count);

/// x[index, index + count) as fp32.
using ConvertFloats = void (*)(const void* x, std::int64_t index, std::int64_t count,
                               FloatType type, float* to);

/// The input as fp32 with zeros around it: what column c of a row in group g of the weight reads at
/// position p is group(g)[positions()[p] + columns()[c]].
class ConvInput {
 public:
  ConvInput(const FloatConvArgs& args, ConvertFloats convert, const ParallelFor& parallel_for);

  const float* group(std::int64_t g) const {
    return data_ + g * shape_.group_channels() * channel_stride_;
  }
  const std::int64_t* columns() const { return columns_.data(); }
  /// Positions of all samples.
  std::int64_t count() const { return static_cast<std::int64_t>(positions_.size()); }
  /// Where they begin.
  const std::int64_t* positions() const { return positions_.data(); }

 private:
  bool lies_well(FloatType type) const;
  void find_columns();
  void find_positions();
  void copy(const FloatConvArgs& args, ConvertFloats convert,
            const ParallelFor& parallel_for) const;
  void copy_lines(const FloatConvArgs& args, ConvertFloats convert, std::int64_t plane,
                  std::int64_t first, std::int64_t last, float* to) const;
  void copy_line(const FloatConvArgs& args, ConvertFloats convert, std::int64_t plane,
                 std::int64_t depth, std::int64_t height, float* to) const;

  std::int64_t padded_pixels() const { return padded_[0] * padded_[1] * padded_[2]; }
  std::int64_t sample_stride() const {
    return is_planes_ ? shape_.channels * channel_stride_ : padded_pixels() * pixel_stride_;
  }
  /// Of the pixel that is `index` steps from the first.
  std::int64_t offset_of(const ConvShape::Extent& index, const ConvShape::Extent& step) const {
    return ((index[0] * step[0] * padded_[1] + index[1] * step[1]) * padded_[2] +
            index[2] * step[2]) *
           pixel_stride_;
  }

  ConvShape shape_;
  ConvShape::Extent padded_;  ///< sizes with the padding
  bool is_planes_;
  std::int64_t pixel_stride_, channel_stride_;  ///< in floats
  bool is_copied_;
  Scratch scratch_;
  const float* data_;
  std::vector<std::int64_t> columns_, positions_;
};

/// Dequantizes, multiplies and adds in fp32 and rounds once, to args.type. The same bits for any
/// number of threads and in either order.
struct FloatConvKernel {
  ConvertFloats convert;
  void (*run)(const FloatConvArgs& args, const ConvInput& input, const ParallelFor& parallel_for);
};

/// The kernel of an instruction set; null where it has none.
QUANTAL_API const FloatConvKernel* find_float_conv(Isa isa);

/// Precondition: find_float_conv(isa), takes_groups(args.shape).
QUANTAL_API void float_conv(Isa isa, const FloatConvArgs& args,
                            const ParallelFor& parallel_for = serial_for);

extern const FloatConvKernel float_conv__avx2, float_conv__avx512;

}  // namespace quantal::kernels
