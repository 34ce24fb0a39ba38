#include "tensor/convolution.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "ops/weight_only_conv.h"
#include "tensor/activation.h"
#include "tensor/autograd.h"
#include "tensor/qtensor_impl.h"

namespace quantal {
namespace {

using kernels::ConvShape;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

at::Tensor as_dtype(const at::Tensor& t, at::ScalarType dtype) {
  return t.defined() && t.scalar_type() != dtype ? t.to(dtype) : t;
}

// Kernels add one number to a channel.
bool takes_bias(const at::Tensor& bias, std::int64_t rows) {
  return !bias.defined() || (bias.dim() == 1 && bias.size(0) == rows);
}

// A convolution that the CPU's kernels compute.
struct Packed {
  PackedRows weight;
  ConvShape shape;
  bool is_integer;  ///< over int8 codes
  ConvWay way;      ///< over floats
};

std::optional<Packed> as_packed(const at::Tensor& x, const at::Tensor& weight,
                                const at::Tensor& bias, const ConvParams& params, bool is_dynamic) {
  if (!is_weight(weight) || !PackedWeight::takes_activations(x) ||
      !takes_bias(bias, weight.size(0))) {
    return std::nullopt;
  }
  const auto shape = conv_shape(x.sizes(), weight.sizes(), params);
  const bool has_codes = is_dynamic || has_int8_codes(x);
  if (!shape) return std::nullopt;
  const ConvWay way = conv_way(*shape, x);
  if (way == ConvWay::kAten && !has_codes) return std::nullopt;
  auto packed = packed_rows(weight);
  if (!packed) return std::nullopt;
  const bool is_integer = has_codes && packed->weight->is_integer();
  if (!is_integer && (is_dynamic || way == ConvWay::kAten)) return std::nullopt;
  return Packed{std::move(*packed), *shape, is_integer, way};
}

SampleCodes sample_codes(const at::Tensor& x) {
  if (!has_int8_codes(x)) return quantize_samples(is_qtensor(x) ? quantized_value(x) : x);
  return {activation_codes(x), impl_of(x)->activation->scale.expand({x.size(0)})};
}

at::Tensor packed_forward(const Packed& conv, const at::Tensor& x, const at::Tensor& bias,
                          const at::Tensor& output_scale = {}) {
  const at::Tensor added = as_dtype(bias, x.scalar_type());
  const PackedWeight& weight = *conv.weight.weight;
  const std::int64_t begin = conv.weight.rows.begin;
  if (!conv.is_integer) {
    const at::Tensor value = is_qtensor(x) ? quantized_value(x) : x;
    if (conv.way == ConvWay::kDirect) {
      return direct_convolution(weight, begin, conv.shape, value, added);
    }
    if (conv.way == ConvWay::kGrouped) {
      const at::Tensor floats = weight.decode(begin, conv.shape.rows, at::kFloat);
      return grouped_convolution(floats, conv.shape, value, added);
    }
    return patch_convolution(conv.shape, value, [&](const at::Tensor& patches) {
      return weight.linear(patches, added, begin, conv.shape.rows);
    });
  }
  const SampleCodes input = sample_codes(x);
  if (output_scale.defined()) {
    const at::Tensor scale = output_scale.to(at::kCPU, at::kFloat);
    const at::Tensor codes = integer_convolution(weight, begin, conv.shape, input, x.scalar_type(),
                                                 added, scale.item<float>());
    if (codes.defined()) return activation_from_codes(codes, qint8, scale, x.scalar_type());
  }
  return integer_convolution(weight, begin, conv.shape, input, x.scalar_type(), added);
}

// What float kernels read of the input; differentiable.
at::Tensor input_value(const at::Tensor& x, bool is_dynamic) {
  const at::Tensor value = dequantize_ste(x);
  return is_dynamic ? fake_quantize_tokens(value, qint8, TokenAxis::kFirstDim) : value;
}

std::optional<at::Tensor> maybe_as_dtype(const at::Tensor& t, at::ScalarType dtype) {
  return t.defined() ? std::optional(as_dtype(t, dtype)) : std::nullopt;
}

// The codes of a whole weight whose value has x's dtype; null where it has others, or is packed.
std::shared_ptr<const WeightCodes> codes_for(const at::Tensor& x, const at::Tensor& weight) {
  if (!is_weight(weight) || !impl_of(weight)->weight->scheme() || !shows_whole_cell(weight) ||
      weight.scalar_type() != x.scalar_type()) {
    return nullptr;
  }
  return impl_of(weight)->weight->canonical();
}

// Rows of the value of a weight that does not train, in the form that it has; null where it shows
// a part of it.
DecodeRows decoding_of(const at::Tensor& weight) {
  if (!is_weight(weight) || !shows_whole_cell(weight)) return nullptr;
  const at::ScalarType dtype = weight.scalar_type();
  if (const auto codes = codes_for(weight, weight)) {
    return [codes, rows = decoding(*codes, dtype)](std::int64_t begin, std::int64_t count) {
      return rows(begin, count);
    };
  }
  const auto packed = packed_rows(weight);
  if (!packed) return nullptr;
  return [packed, dtype](std::int64_t begin, std::int64_t count) {
    return packed->weight->decode(packed->rows.begin + begin, count, dtype);
  };
}

// By torch's own convolution. Precondition: decoding_of(weight).
at::Tensor frozen_forward(const at::Tensor& x, const at::Tensor& weight,
                          const std::optional<at::Tensor>& bias, const ConvParams& params) {
  if (const auto codes = codes_for(x, weight)) {
    return weight_only_convolution(x, *codes, bias, params);
  }
  return convolution_of_rows(x, weight.sizes(), decoding_of(weight), bias, params);
}

struct Convolution : Function<Convolution> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias,
                            const std::optional<Packed>& conv, const ConvParams& params,
                            bool is_dynamic) {
    at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({x, weight});
    context->saved_data["is_dynamic"] = is_dynamic;
    context->saved_data["stride"] = params.stride;
    context->saved_data["padding"] = params.padding;
    context->saved_data["dilation"] = params.dilation;
    context->saved_data["groups"] = params.groups;
    if (bias) context->saved_data["bias_dtype"] = bias->scalar_type();
    if (conv) return packed_forward(*conv, x, bias.value_or(at::Tensor()));
    return frozen_forward(x, weight, bias, params);
  }

  // Of the float values, in differentiable operations.
  static variable_list backward(AutogradContext* context, variable_list grads) {
    const at::Tensor none;
    if (!grads[0].defined()) return {none, none, none, none, none, none};
    auto& data = context->saved_data;
    const variable_list saved = context->get_saved_variables();
    const bool has_bias = data.count("bias_dtype") != 0;
    const std::array<bool, 3> wanted{context->needs_input_grad(0), context->needs_input_grad(1),
                                     has_bias && context->needs_input_grad(2)};
    const at::Tensor x = input_value(saved[0], data["is_dynamic"].toBool());
    const ConvParams params{.stride = data["stride"].toIntVector(),
                            .padding = data["padding"].toIntVector(),
                            .dilation = data["dilation"].toIntVector(),
                            .output_padding = std::vector<std::int64_t>(saved[1].dim() - 2, 0),
                            .groups = data["groups"].toInt()};
    at::Tensor grad_x, grad_weight, grad_bias;
    const DecodeRows decode = wanted[1] ? nullptr : decoding_of(saved[1]);
    if (decode) {
      if (wanted[0]) {
        grad_x = convolution_input_grad(grads[0], x, saved[1].sizes(), decode, params);
      }
      if (wanted[2]) grad_bias = convolution_bias_grad(grads[0]);
    } else {
      const at::Tensor weight = as_dtype(dequantize_ste(saved[1]), x.scalar_type());
      const std::array<std::int64_t, 1> bias_size{saved[1].size(0)};
      std::tie(grad_x, grad_weight, grad_bias) = at::convolution_backward(
          grads[0], x, weight, at::OptionalIntArrayRef(bias_size), params.stride, params.padding,
          params.dilation, params.transposed, params.output_padding, params.groups, wanted);
    }
    if (wanted[2]) grad_bias = as_dtype(grad_bias, data["bias_dtype"].toScalarType());
    return {grad_x, as_dtype(grad_weight, saved[1].scalar_type()), grad_bias, none, none, none};
  }
};

}  // namespace

at::Tensor convolution_ste(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                           const ConvParams& params, bool is_dynamic,
                           const at::Tensor& output_scale) {
  const bool graph = records_gradients() && (x.requires_grad() || weight.requires_grad() ||
                                             (bias.defined() && bias.requires_grad()));
  if (const auto conv = as_packed(x, weight, bias, params, is_dynamic)) {
    if (graph) {
      return Convolution::apply(x, weight, bias.defined() ? std::optional(bias) : std::nullopt,
                                *conv, params, is_dynamic);
    }
    at::AutoDispatchBelowADInplaceOrView below;
    return packed_forward(*conv, x, bias, output_scale);
  }
  const at::Tensor value = input_value(x, is_dynamic);
  const at::ScalarType dtype = value.scalar_type();
  const auto added = maybe_as_dtype(bias, dtype);
  // Where something does not fit, torch names it.
  const bool fits = !params.transposed && value.dim() == weight.dim() &&
                    value.size(1) == weight.size(1) * params.groups &&
                    weight.size(0) % params.groups == 0 && takes_bias(bias, weight.size(0));
  if (!fits || weight.requires_grad() || !decoding_of(weight)) {
    return aten_convolution(value, as_dtype(dequantize_ste(weight), dtype), added, params);
  }
  if (graph) return Convolution::apply(value, weight, added, std::nullopt, params, false);
  at::AutoDispatchBelowADInplaceOrView below;
  return frozen_forward(value, weight, added, params);
}

}  // namespace quantal
