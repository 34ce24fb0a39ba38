#pragma once

#include <optional>
#include <string_view>
#include <tuple>

#include <ATen/core/Tensor.h>

#include <quantal/qtype.h>

/// torch.ops.quantal.* over the parts of a weight in canonical form, as plain tensors: what modules
/// that keep those parts as parameters call, in eager mode and in compiled and exported graphs.
/// Every operator has kernels for the CPU, for any other device (ATen), Meta and Autograd.
namespace quantal {

using MaybeTensor = std::optional<at::Tensor>;

/// torch.ops.quantal.linear, through the dispatcher: x · wᵀ + bias, in x's dtype. x (…, in); the
/// weight's parts are those of shape (out, in).
///   latent       the float weight whose codes these are: it gets the weight's gradient,
///                straight through
///   activations  the qtype that x is quantized to ("" for none), with `input_scale` or, without
///                one, one scale a token
/// Integer weights and qint8 activations multiply as integers.
at::Tensor linear_op(const at::Tensor& x, const at::Tensor& data, const at::Tensor& scale,
                     const MaybeTensor& shift, const MaybeTensor& bias, c10::string_view qtype,
                     std::int64_t group_size, const MaybeTensor& latent,
                     c10::string_view activations, const MaybeTensor& input_scale);

/// torch.ops.quantal.fake_quantize and decode, through the dispatcher.
at::Tensor fake_quantize_op(const at::Tensor& x, c10::string_view qtype, const MaybeTensor& scale,
                            bool per_sample);
at::Tensor decode_op(const at::Tensor& data, const at::Tensor& scale, const MaybeTensor& shift,
                     c10::string_view qtype, std::int64_t group_size, at::IntArrayRef sizes,
                     at::ScalarType dtype, const MaybeTensor& latent);

}  // namespace quantal
