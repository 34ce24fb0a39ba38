#pragma once

#include "ops/plain_ops.h"

namespace quantal {

/// torch.ops.quantal.convolution, through the dispatcher: at::convolution(), not transposed, in x's
/// dtype and memory format. x (batch, channels, …); the weight's parts are those of shape `sizes`
/// (out, channels / groups, …). The other arguments are those of linear_op(); without an
/// `input_scale`, activations have one scale a sample. Integer weights and qint8 activations
/// multiply as integers where gains_from_codes(); otherwise their float values do.
at::Tensor convolution_op(const at::Tensor& x, const at::Tensor& data, const at::Tensor& scale,
                          const MaybeTensor& shift, const MaybeTensor& bias, c10::string_view qtype,
                          std::int64_t group_size, at::IntArrayRef sizes, at::IntArrayRef stride,
                          at::IntArrayRef padding, at::IntArrayRef dilation, std::int64_t groups,
                          const MaybeTensor& latent, c10::string_view activations,
                          const MaybeTensor& input_scale);

}  // namespace quantal
