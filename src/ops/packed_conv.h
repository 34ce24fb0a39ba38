#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include <ATen/core/Tensor.h>

#include "kernels/conv_way.h"
#include "ops/packed_weight.h"

namespace quantal {

/// What at::convolution() takes beside tensors.
struct ConvParams {
  std::vector<std::int64_t> stride, padding, dilation;
  bool transposed = false;
  std::vector<std::int64_t> output_padding;
  std::int64_t groups = 1;
};

/// The convolution of an input and a weight of these sizes, or nothing where the kernels do not
/// take it: transposed, empty, of more than three dimensions, or not a convolution at all.
std::optional<kernels::ConvShape> conv_shape(at::IntArrayRef input, at::IntArrayRef weight,
                                             const ConvParams& params);

/// The last `dims` of three dimensions get the one number, or one each; those in front `other`.
kernels::ConvShape::Extent spread(at::IntArrayRef values, std::int64_t dims, std::int64_t other);

/// int8 codes (batch, channels, …) with one scale a sample, fp32 (batch).
struct SampleCodes {
  at::Tensor codes;
  at::Tensor scales;
};
/// x with scale = max|x| / 127 of each sample. A sample with a NaN or infinity has a scale of NaN.
/// Precondition: PackedWeight::takes_activations(x).
SampleCodes quantize_samples(const at::Tensor& x);

/// Rows [begin, begin + shape.rows) of `weight` over codes, exact (kernels/integer_conv.h); bias
/// (rows) of `dtype` or undefined. The result, of `dtype`, has the memory format of the codes. With
/// an output_scale it is int8 codes of that scale, as int8_codes() makes them, or undefined
/// where there is a NaN.
/// Precondition: weight.is_integer(), PackedWeight::begins_tile(begin).
at::Tensor integer_convolution(const PackedWeight& weight, std::int64_t begin,
                               const kernels::ConvShape& shape, const SampleCodes& x,
                               at::ScalarType dtype, const at::Tensor& bias,
                               std::optional<float> output_scale = std::nullopt);

/// How a weight-only convolution of x runs. Precondition: conv_shape() gave the shape,
/// PackedWeight::takes_activations(x).
using kernels::ConvWay;
ConvWay conv_way(const kernels::ConvShape& shape, const at::Tensor& x);

/// Rows [begin, begin + shape.rows) of `weight` by x, read where it lies (kernels/float_conv.h);
/// bias (rows) of x's dtype or undefined. In x's dtype and memory format.
/// Precondition: conv_way() == ConvWay::kDirect, PackedWeight::takes_activations(x),
/// PackedWeight::begins_tile(begin).
at::Tensor direct_convolution(const PackedWeight& weight, std::int64_t begin,
                              const kernels::ConvShape& shape, const at::Tensor& x,
                              const at::Tensor& bias);

/// The same of a weight in canonical form. Precondition: gathers_on_cpu(weight, x's dtype).
at::Tensor direct_convolution(const WeightCodes& weight, const kernels::ConvShape& shape,
                              const at::Tensor& x, const at::Tensor& bias);

/// In groups (kernels/grouped_conv.h): `weight` (rows, columns) is contiguous fp32. In x's dtype
/// and memory format. Precondition: conv_way() == ConvWay::kGrouped,
/// PackedWeight::takes_activations(x).
at::Tensor grouped_convolution(const at::Tensor& weight, const kernels::ConvShape& shape,
                               const at::Tensor& x, const at::Tensor& bias);

/// A convolution of floats as a linear of the patches that the kernel covers, so that the weight is
/// never dequantized as a whole: `linear` takes (batch * positions, columns) to (…, rows). In x's
/// dtype and memory format.
/// Precondition: PackedWeight::takes_activations(x), shape.groups == 1.
at::Tensor patch_convolution(const kernels::ConvShape& shape, const at::Tensor& x,
                             const std::function<at::Tensor(const at::Tensor&)>& linear);

}  // namespace quantal
