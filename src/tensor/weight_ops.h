#pragma once

#include <ATen/core/Tensor.h>

/// Compute operations on quantized weights and activations: the kernels of PrivateUse3 and of
/// AutogradPrivateUse3 both. Signatures are ATen's.
namespace quantal {

using OptionalTensor = std::optional<at::Tensor>;

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias);
/// linear() with x quantized to int8 first, one scale a token, whatever the weight's layer says.
at::Tensor linear_dynamic(const at::Tensor& x, const at::Tensor& weight,
                          const OptionalTensor& bias);
at::Tensor matmul(const at::Tensor& a, const at::Tensor& b);
at::Tensor mm(const at::Tensor& a, const at::Tensor& b);
at::Tensor addmm(const at::Tensor& bias, const at::Tensor& a, const at::Tensor& b,
                 const at::Scalar& beta, const at::Scalar& alpha);
/// torch.ops.quantal.linear over a quantized activation.
at::Tensor linear_of_activation(const at::Tensor& x, const at::Tensor& data,
                                const at::Tensor& scale, const OptionalTensor& shift,
                                const OptionalTensor& bias, c10::string_view qtype,
                                std::int64_t group_size, const OptionalTensor& latent,
                                c10::string_view activations, const OptionalTensor& input_scale);
/// torch.ops.quantal.convolution over a quantized activation.
at::Tensor convolution_of_activation(const at::Tensor& x, const at::Tensor& data,
                                     const at::Tensor& scale, const OptionalTensor& shift,
                                     const OptionalTensor& bias, c10::string_view qtype,
                                     std::int64_t group_size, at::IntArrayRef sizes,
                                     at::IntArrayRef stride, at::IntArrayRef padding,
                                     at::IntArrayRef dilation, std::int64_t groups,
                                     const OptionalTensor& latent, c10::string_view activations,
                                     const OptionalTensor& input_scale);
at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                       c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                       c10::SymIntArrayRef dilation, bool transposed,
                       c10::SymIntArrayRef output_padding, c10::SymInt groups);
at::Tensor traced_convolution(const at::Tensor& x, const at::Tensor& weight,
                              const OptionalTensor& bias, c10::SymIntArrayRef stride,
                              c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                              bool transposed, c10::SymIntArrayRef output_padding,
                              c10::SymInt groups, bool benchmark, bool deterministic,
                              bool cudnn_enabled, bool allow_tf32);
/// Convolution with x quantized to int8 first, one scale a sample, whatever the weight's layer
/// says.
at::Tensor conv_dynamic(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                        at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                        std::int64_t groups);
at::Tensor embedding(const at::Tensor& weight, const at::Tensor& indices, c10::SymInt padding_idx,
                     bool scale_grad_by_freq, bool sparse);
at::Tensor layer_norm(const at::Tensor& x, c10::SymIntArrayRef normalized_shape,
                      const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                      bool cudnn_enable);
at::Tensor transpose_matrix(const at::Tensor& t);

}  // namespace quantal
