#include "tensor/weight_ops.h"

#include <ATen/ATen.h>

#include "ops/plain_conv.h"
#include "ops/plain_ops.h"
#include "tensor/activation.h"
#include "tensor/autograd.h"
#include "tensor/bound_weight.h"
#include "tensor/convolution.h"
#include "tensor/nested.h"
#include "tensor/qtensor_impl.h"

namespace quantal {
namespace {

std::shared_ptr<LayerState> layer_of(const at::Tensor& t) {
  return is_weight(t) ? impl_of(t)->weight->layer : nullptr;
}

// Nothing where torch's functions give a tensor that is none.
OptionalTensor given(const OptionalTensor& t) { return t && t->defined() ? t : std::nullopt; }

OptionalTensor dequantize_ste(const OptionalTensor& t) {
  return t ? OptionalTensor(quantal::dequantize_ste(*t)) : t;
}

// torch::nn::Linear hands addmm and matmul its weight transposed.
bool is_transposed_weight(const at::Tensor& t) {
  if (!is_weight(t) || t.dim() != 2) return false;
  const auto rows = rows_of(t);
  return rows && rows->transposed;
}

void check_input(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == weight.size(1),
                    "[quantal::linear] expected input of shape (…, ", weight.size(1),
                    ") for a weight of shape (out, in) = ", weight.sizes(), ", got ", x.sizes());
  TORCH_CHECK_VALUE(at::isFloatingType(x.scalar_type()) || x.is_complex(),
                    "[quantal::linear] expected a floating-point input, got ", x.scalar_type());
}

at::Tensor quantized_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                            bool bias_follows) {
  if (x.is_nested()) {
    return over_tokens(x,
                       [&](const at::Tensor& rows) { return quantal::linear(rows, weight, bias); });
  }
  check_input(x, weight);
  const auto layer = layer_of(weight);
  // One scale a token is part of the integer kernel.
  const bool is_dynamic = quantizes_dynamically(layer, x) && layer->activations == qint8;
  const at::Tensor input =
      is_dynamic ? quantal::dequantize_ste(x) : prepare_input(layer, x, TokenAxis::kLastDim);
  const at::Tensor scale = int8_output_scale(layer, bias_follows);
  return finish_output(layer, linear_ste(input, weight, bias, is_dynamic, scale), bias_follows);
}

// Of an activation's codes, which are those that quantizing its value with it gives; or `given`,
// where the codes are of another type or there are none.
OptionalTensor scale_of(const at::Tensor& x, c10::string_view activations,
                        const OptionalTensor& given) {
  const bool has_such = has_codes(x) && impl_of(x)->activation->qtype.name == activations;
  return has_such ? OptionalTensor(impl_of(x)->activation->scale) : given;
}

}  // namespace

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) {
  if (const BoundWeight* bound = bound_weight(weight)) {
    return linear_op(x, bound->data(), bound->scale, bound->shift, given(bias), bound->qtype,
                     bound->group_size, std::nullopt, bound->activations, bound->input_scale);
  }
  const at::Tensor added = bias ? dequantize_ste(*bias) : at::Tensor();
  if (is_weight(weight) && weight.dim() == 2 && !is_transposed_weight(weight)) {
    return quantized_linear(x, weight, added, /*bias_follows=*/false);
  }
  return at::linear(dequantize_ste(x), dequantize_ste(weight), added);
}

at::Tensor linear_dynamic(const at::Tensor& x, const at::Tensor& weight,
                          const OptionalTensor& bias) {
  TORCH_CHECK_VALUE(is_weight(weight) && impl_of(weight)->weight->scheme() && weight.dim() == 2 &&
                        !is_transposed_weight(weight),
                    "[quantal::linear_dynamic] expected a quantized weight of shape (out, in)");
  check_input(x, weight);
  return linear_ste(quantal::dequantize_ste(x), weight, bias.value_or(at::Tensor()),
                    /*is_dynamic=*/true);
}

at::Tensor linear_of_activation(const at::Tensor& x, const at::Tensor& data,
                                const at::Tensor& scale, const OptionalTensor& shift,
                                const OptionalTensor& bias, c10::string_view qtype,
                                std::int64_t group_size, const OptionalTensor& latent,
                                c10::string_view activations, const OptionalTensor& input_scale) {
  return linear_op(quantized_value(x), data, scale, shift, bias, qtype, group_size, latent,
                   activations, scale_of(x, activations, input_scale));
}

at::Tensor convolution_of_activation(const at::Tensor& x, const at::Tensor& data,
                                     const at::Tensor& scale, const OptionalTensor& shift,
                                     const OptionalTensor& bias, c10::string_view qtype,
                                     std::int64_t group_size, at::IntArrayRef sizes,
                                     at::IntArrayRef stride, at::IntArrayRef padding,
                                     at::IntArrayRef dilation, std::int64_t groups,
                                     const OptionalTensor& latent, c10::string_view activations,
                                     const OptionalTensor& input_scale) {
  return convolution_op(quantized_value(x), data, scale, shift, bias, qtype, group_size, sizes,
                        stride, padding, dilation, groups, latent, activations,
                        scale_of(x, activations, input_scale));
}

at::Tensor matmul(const at::Tensor& a, const at::Tensor& b) {
  if (is_transposed_weight(b)) {
    const auto layer = layer_of(b);
    return quantized_linear(a, b.t(), {}, /*bias_follows=*/layer && layer->has_bias);
  }
  return at::matmul(dequantize_ste(a), dequantize_ste(b));
}

at::Tensor mm(const at::Tensor& a, const at::Tensor& b) {
  if (is_transposed_weight(b) && a.dim() == 2) {
    return quantized_linear(a, b.t(), {}, /*bias_follows=*/false);
  }
  return at::mm(dequantize_ste(a), dequantize_ste(b));
}

at::Tensor addmm(const at::Tensor& bias, const at::Tensor& a, const at::Tensor& b,
                 const at::Scalar& beta, const at::Scalar& alpha) {
  const bool is_linear = is_transposed_weight(b) && a.dim() == 2 && bias.dim() == 1 &&
                         bias.size(0) == b.size(1) && beta.equal(1) && alpha.equal(1);
  if (is_linear) {
    return quantized_linear(a, b.t(), dequantize_ste(bias), /*bias_follows=*/false);
  }
  return at::addmm(dequantize_ste(bias), dequantize_ste(a), dequantize_ste(b), beta, alpha);
}

at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                       c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                       c10::SymIntArrayRef dilation, bool transposed,
                       c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  const BoundWeight* bound = bound_weight(weight);
  if (bound != nullptr && !transposed) {
    return convolution_op(x, bound->data(), bound->scale, bound->shift, given(bias), bound->qtype,
                          bound->group_size, bound->sizes, C10_AS_INTARRAYREF_SLOW(stride),
                          C10_AS_INTARRAYREF_SLOW(padding), C10_AS_INTARRAYREF_SLOW(dilation),
                          groups.expect_int(), std::nullopt, bound->activations,
                          bound->input_scale);
  }
  const auto layer = layer_of(weight);
  // One scale a sample is part of the integer kernel.
  const bool is_dynamic = quantizes_dynamically(layer, x) && layer->activations == qint8;
  const at::Tensor input =
      is_dynamic ? quantal::dequantize_ste(x) : prepare_input(layer, x, TokenAxis::kFirstDim);
  const ConvParams params{.stride = C10_AS_INTARRAYREF_SLOW(stride).vec(),
                          .padding = C10_AS_INTARRAYREF_SLOW(padding).vec(),
                          .dilation = C10_AS_INTARRAYREF_SLOW(dilation).vec(),
                          .transposed = transposed,
                          .output_padding = C10_AS_INTARRAYREF_SLOW(output_padding).vec(),
                          .groups = groups.expect_int()};
  return finish_output(
      layer, convolution_ste(input, weight, dequantize_ste(bias).value_or(at::Tensor()), params,
                             is_dynamic, int8_output_scale(layer)));
}

at::Tensor traced_convolution(const at::Tensor& x, const at::Tensor& weight,
                              const OptionalTensor& bias, c10::SymIntArrayRef stride,
                              c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                              bool transposed, c10::SymIntArrayRef output_padding,
                              c10::SymInt groups, bool, bool, bool, bool) {
  return quantal::convolution(x, weight, bias, stride, padding, dilation, transposed,
                              output_padding, std::move(groups));
}

at::Tensor conv_dynamic(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                        at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                        std::int64_t groups) {
  TORCH_CHECK_VALUE(is_weight(weight) && impl_of(weight)->weight->scheme() && weight.dim() >= 3,
                    "[quantal::conv_dynamic] expected a quantized weight of shape (out, in, …)");
  TORCH_CHECK_VALUE(x.dim() == weight.dim() && x.size(1) == weight.size(1) * groups,
                    "[quantal::conv_dynamic] expected input of shape (batch, ",
                    weight.size(1) * groups, ", …) for a weight of shape ", weight.sizes(), " in ",
                    groups, " groups, got ", x.sizes());
  TORCH_CHECK_VALUE(at::isFloatingType(x.scalar_type()),
                    "[quantal::conv_dynamic] expected a floating-point input, got ",
                    x.scalar_type());
  const std::vector<std::int64_t> no_padding(weight.dim() - 2, 0);
  return convolution_ste(quantal::dequantize_ste(x), weight, bias.value_or(at::Tensor()),
                         {.stride = stride.vec(),
                          .padding = padding.vec(),
                          .dilation = dilation.vec(),
                          .output_padding = no_padding,
                          .groups = groups},
                         /*is_dynamic=*/true);
}

at::Tensor embedding(const at::Tensor& weight, const at::Tensor& indices, c10::SymInt padding_idx,
                     bool scale_grad_by_freq, bool sparse) {
  const at::Tensor rows = dequantize_ste(indices);
  if (is_weight(weight) && weight.dim() == 2) {
    return embedding_ste(weight, rows, padding_idx.expect_int(), scale_grad_by_freq, sparse);
  }
  return at::embedding_symint(dequantize_ste(weight), rows, padding_idx, scale_grad_by_freq,
                              sparse);
}

at::Tensor layer_norm(const at::Tensor& x, c10::SymIntArrayRef normalized_shape,
                      const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                      bool cudnn_enable) {
  const auto layer = weight ? layer_of(*weight) : nullptr;
  if (layer && x.is_nested() && normalized_shape.size() == 1) {
    return over_tokens(x, [&](const at::Tensor& rows) {
      return quantal::layer_norm(rows, normalized_shape, weight, bias, eps, cudnn_enable);
    });
  }
  return finish_output(
      layer, at::layer_norm_symint(dequantize_ste(x), normalized_shape, dequantize_ste(weight),
                                   dequantize_ste(bias), eps, cudnn_enable));
}

at::Tensor transpose_matrix(const at::Tensor& t) {
  TORCH_CHECK(t.dim() <= 2, "t() expects a tensor with <= 2 dimensions, but self is ", t.dim(),
              "D");
  return t.dim() == 2 ? make_transposed(t) : *make_alias(t, Geometry::of(t));
}

}  // namespace quantal
