#pragma once

#include <ATen/core/Tensor.h>

#include "ops/packed_conv.h"

namespace quantal {

/// at::convolution() over the quantized values of x and the weight, in x's dtype; differentiable.
/// On the CPU, products of int8 activations and an integer weight are exact, and float activations
/// at few positions meet the packed weight; both keep codes, not floats, for the backward pass.
/// `is_dynamic`: x is quantized to int8 first, one scale a sample. `output_scale`, or undefined:
/// that of the int8 activation that the caller will make of the result, which it then may be
/// already.
at::Tensor convolution_ste(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                           const ConvParams& params, bool is_dynamic,
                           const at::Tensor& output_scale = {});

}  // namespace quantal
