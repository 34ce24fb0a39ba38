#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

#include "kernels/conv_shape.h"
#include "ops/weight_codes.h"

/// Which way of a convolution takes the least time: fitted to layers of common networks
/// (benchmarks/conv.py, docs/performance.md).
namespace quantal {

/// How a weight-only convolution runs (packed_conv.h).
enum class ConvWay : std::uint8_t {
  kDirect,   ///< direct_convolution()
  kGrouped,  ///< grouped_convolution() of the dequantized weight
  kPatches,  ///< patch_convolution()
  kAten,     ///< at::convolution() of the dequantized weight
};
/// For an input of that format and dtype. Precondition: conv_shape() gave the shape.
ConvWay conv_way(const kernels::ConvShape& shape, at::MemoryFormat format, at::ScalarType dtype);

/// Whether integer_convolution() takes less time than rounding the input and a float convolution,
/// where the weight has to be packed first. Precondition: PackedWeight::takes(weight), its type is
/// an integer.
bool gains_from_codes(const kernels::ConvShape& shape, const WeightCodes& weight);

}  // namespace quantal
