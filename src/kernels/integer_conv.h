#pragma once

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
};

/// Each position of the output is a token of an integer linear (integer_linear.h) over the codes
/// that the kernel covers there, zeros in the padding, and has its bits: on every instruction set,
/// on any number of threads, in every order.
QUANTAL_API void integer_conv(Isa isa, const IntegerConvArgs& args,
                              const ParallelFor& parallel_for = serial_for);

// Its two ways: patches through the integer linear, for every convolution; and without them, where
// has_depthwise(). Codes are in patch_order() for the first, kLast for the second.
bool has_depthwise(const IntegerConvArgs& args);
void conv_by_patches(Isa isa, const IntegerConvArgs& args, const std::int8_t* codes,
                     const ParallelFor& parallel_for);
void conv_depthwise(Isa isa, const IntegerConvArgs& args, const std::int8_t* codes,
                    const ParallelFor& parallel_for);

/// Rows [first, first + count) of `source`, (positions, stride), go to positions
/// [position, position + positions) of a sample of y: rows of `type`, from `row` on.
struct RowBlock {
  const void* source = nullptr;
  std::int64_t stride = 0;
  std::int64_t first = 0;
  std::int64_t count = 0;
  std::int64_t sample = 0;
  std::int64_t row = 0;
  std::int64_t position = 0;
  std::int64_t positions = 0;
};
void store_rows_of(const IntegerConvArgs& args, const RowBlock& block);

}  // namespace quantal::kernels
