#pragma once

#include <cstdint>

#include <quantal/isa.h>

#include "kernels/conv_patches.h"

/// Which way of a convolution takes the least time: fitted to layers of common networks
/// (benchmarks/conv.py, docs/performance.md).
namespace quantal::kernels {

/// How a weight-only convolution runs.
enum class ConvWay : std::uint8_t {
  kDirect,   ///< float_conv()
  kGrouped,  ///< grouped_conv() of the dequantized weight
  kPatches,  ///< the linear of patches
  kAten,     ///< torch's of the dequantized weight
};
/// For an input of that order and type.
QUANTAL_API ConvWay conv_way(Isa isa, const ConvShape& shape, ChannelOrder order, FloatType type);

/// Whether integer_conv() takes less time than rounding the input and a float convolution, where
/// the weight of that layout has to be packed first.
QUANTAL_API bool gains_from_codes(Isa isa, const ConvShape& shape, const PackedLayout& layout);

}  // namespace quantal::kernels
