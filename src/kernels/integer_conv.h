#pragma once

#include <optional>

#include <quantal/isa.h>

#include "kernels/conv_patches.h"

/// Convolution of int8 activations with a packed integer weight.
namespace quantal::kernels {

/// Arguments of an integer convolution. Checked by the caller: kernels trust them.
struct IntegerConvArgs {
  ConvShape shape;
  const PackedLayout* layout = nullptr;  ///< int8, int4 or int2: (shape.rows, shape.columns())
  const std::byte* weight = nullptr;
  const std::int8_t* codes = nullptr;  ///< (batch, channels, pixels) or (batch, pixels, channels)
  ChannelOrder order = ChannelOrder::kPlanes;  ///< of codes and y
  const float* scales = nullptr;               ///< one a sample; NaN: so is its output
  FloatType type = FloatType::kF32;            ///< of y and bias
  void* y = nullptr;                           ///< (batch, rows, positions), or in the other order
  const void* bias = nullptr;                  ///< (rows), or null
  /// y is int8 codes of this scale, to which numbers of `type` are rounded as quantize_codes()
  /// does.
  std::optional<float> y_scale;

  std::int64_t y_element_size() const { return y_scale ? 1 : size_of(type); }
  std::byte* y_at(std::int64_t index) const {
    return static_cast<std::byte*>(y) + index * y_element_size();
  }
};

/// Each position of the output is a token of an integer linear (integer_linear.h) over the codes
/// that the kernel covers there, zeros in the padding, and has its bits: on every instruction set,
/// on any number of threads, in every order. False where a number that y should hold as a code is
/// NaN; y is then unspecified.
QUANTAL_API bool integer_conv(Isa isa, const IntegerConvArgs& args,
                              const ParallelFor& parallel_for = serial_for);

/// Whether it goes without patches, which takes less time (kernels/grouped_conv.h).
QUANTAL_API bool goes_without_patches(Isa isa, const ConvShape& shape, const PackedLayout& layout,
                                      ChannelOrder order);

/// That way. Precondition: goes_without_patches().
bool conv_without_patches(Isa isa, const IntegerConvArgs& args, const ParallelFor& parallel_for);

/// Rows [first, first + count) of `source`, (positions, stride) of y's elements, go to positions
/// [position, position + positions) of a sample of y, from `row` on.
struct RowBlock {
  const std::byte* source = nullptr;
  std::int64_t stride = 0;
  std::int64_t first = 0;
  std::int64_t count = 0;
  std::int64_t sample = 0;
  std::int64_t row = 0;
  std::int64_t position = 0;
  std::int64_t positions = 0;
};
void store_rows(Isa isa, const IntegerConvArgs& args, const RowBlock& block);

}  // namespace quantal::kernels
