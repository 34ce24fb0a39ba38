#pragma once

#include <cstdint>

#include <quantal/isa.h>

#include "kernels/conv_patches.h"

/// Max pooling of int8 codes. With one positive scale a larger code is a larger number.
namespace quantal::kernels {

/// Arguments of a max pooling without dilation. Checked by the caller: kernels trust them, and that
/// every window has a pixel of the input.
struct MaxPoolArgs {
  using Extent = ConvShape::Extent;

  std::int64_t batch = 1;
  std::int64_t channels = 1;
  Extent input{1, 1, 1};
  Extent output{1, 1, 1};  ///< with the windows that ceil_mode adds
  Extent kernel{1, 1, 1};
  Extent stride{1, 1, 1};
  Extent padding{0, 0, 0};
  ChannelOrder order = ChannelOrder::kPlanes;  ///< of codes and y
  const std::int8_t* codes = nullptr;  ///< (batch, channels, input) or (batch, input, channels)
  std::int8_t* y = nullptr;            ///< (batch, channels, output), or in the other order
};

QUANTAL_API void max_pool(Isa isa, const MaxPoolArgs& args,
                          const ParallelFor& parallel_for = serial_for);

/// The two loops of an instruction set.
struct MaxPoolKernel {
  /// y[i] = max(y[i], row[i])
  void (*raise)(const std::int8_t* row, std::int64_t width, std::int8_t* y);
  /// y[i] = the largest of `taps` bytes from line + i * stride
  void (*reduce)(const std::int8_t* line, std::int64_t taps, std::int64_t stride,
                 std::int64_t count, std::int8_t* y);
};
QUANTAL_API MaxPoolKernel find_max_pool(Isa isa);

MaxPoolKernel max_pool__portable();
MaxPoolKernel max_pool__avx2();

}  // namespace quantal::kernels
