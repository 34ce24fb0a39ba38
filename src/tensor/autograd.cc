#include "tensor/autograd.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "tensor/activation.h"
#include "tensor/qtensor_impl.h"

namespace quantal {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using Forward = std::function<at::Tensor(const at::Tensor&)>;

at::Tensor run_below_autograd(const at::Tensor& x, const Forward& forward) {
  at::AutoDispatchBelowADInplaceOrView below;
  return forward(x);
}

struct StraightThrough : Function<StraightThrough> {
  static at::Tensor forward(AutogradContext*, const at::Tensor& x, const Forward& forward) {
    return run_below_autograd(x, forward);
  }
  static variable_list backward(AutogradContext*, variable_list grads) {
    return {grads[0], at::Tensor()};
  }
};

// How a linear quantizes its input.
enum class Input : std::uint8_t {
  kAsItIs,
  kDynamicInt8,  // one scale a token, as fake_quantize_tokens()
};

// Over x's codes, or over those of its tokens.
at::Tensor integer_linear(const PackedRows& w, const at::Tensor& x, const at::Tensor& bias,
                          std::optional<float> output_scale = std::nullopt) {
  const auto [begin, count] = std::pair(w.rows.begin, w.rows.count);
  if (has_int8_codes(x)) {
    const float scale = impl_of(x)->activation->scale.item<float>();
    return w.weight->static_linear(activation_codes(x), scale, x.scalar_type(), bias, begin, count,
                                   output_scale);
  }
  const at::Tensor value = is_qtensor(x) ? quantized_value(x) : x;
  return w.weight->dynamic_linear(value, bias, begin, count, output_scale);
}

at::Tensor packed_linear(const PackedRows& w, const at::Tensor& x, const at::Tensor& bias,
                         Input input, const at::Tensor& output_scale) {
  const at::Tensor added = bias.defined() ? bias.to(x.scalar_type()) : bias;
  const bool is_dynamic = input == Input::kDynamicInt8;
  if (!w.weight->is_integer() || !(is_dynamic || has_int8_codes(x))) {
    at::Tensor value = is_qtensor(x) ? quantized_value(x) : x;
    if (is_dynamic) value = fake_quantize_tokens(value, qint8, TokenAxis::kLastDim);
    return w.weight->linear(value, added, w.rows.begin, w.rows.count);
  }
  if (output_scale.defined()) {
    const at::Tensor scale = output_scale.to(at::kCPU, at::kFloat);
    const at::Tensor codes = integer_linear(w, x, added, scale.item<float>());
    if (codes.defined()) return activation_from_codes(codes, qint8, scale, x.scalar_type());
  }
  return integer_linear(w, x, added);
}

at::Tensor linear_forward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                          Input how, const at::Tensor& output_scale = {}) {
  if (PackedWeight::takes_activations(x)) {
    if (const auto packed = packed_rows(weight)) {
      return packed_linear(*packed, x, bias, how, output_scale);
    }
  }
  at::Tensor input = is_qtensor(x) ? quantized_value(x) : x;
  if (how == Input::kDynamicInt8) input = fake_quantize_tokens(input, qint8, TokenAxis::kLastDim);
  at::Tensor matrix = is_qtensor(weight) ? quantized_value(weight) : weight;
  if (matrix.scalar_type() != input.scalar_type()) matrix = matrix.to(input.scalar_type());
  return at::linear(input, matrix, bias.defined() ? bias.to(input.scalar_type()) : bias);
}

at::Tensor as_matrix(const at::Tensor& t) {
  if (t.dim() == 2) return t;
  return t.reshape({c10::multiply_integers(t.sizes().slice(0, t.dim() - 1)), t.size(-1)});
}

// Elements of a weight that are floats at a time during a backward pass.
constexpr std::int64_t kBackwardElements = 1 << 20;

// grad · w, differentiable while a graph is recorded. Otherwise a large weight is dequantized a
// block of rows after the other, and the sums are kept in fp32.
at::Tensor times_weight(const at::Tensor& grad, const at::Tensor& weight) {
  const auto rows =
      is_weight(weight) && impl_of(weight)->weight->scheme() ? rows_of(weight) : std::nullopt;
  const bool in_blocks = rows && !rows->transposed && !at::GradMode::is_enabled() &&
                         weight.numel() > kBackwardElements && grad.scalar_type() != at::kDouble;
  if (!in_blocks) return grad.mm(dequantize_ste(weight).to(grad.scalar_type()));
  at::AutoDispatchBelowADInplaceOrView below;
  WeightCell& cell = *impl_of(weight)->weight;
  const std::int64_t columns = weight.size(1);
  const std::int64_t step = std::max<std::int64_t>(kBackwardElements / columns / 16, 1) * 16;
  at::Tensor sum = at::zeros({grad.size(0), columns}, grad.options().dtype(at::kFloat));
  for (std::int64_t i = 0; i < rows->count; i += step) {
    const std::int64_t count = std::min(step, rows->count - i);
    const at::Tensor part = cell.decode(rows->begin + i, count, grad.scalar_type());
    const at::Tensor of_grad = grad.narrow(1, i, count);
    if (grad.scalar_type() == at::kFloat) {
      sum.addmm_(of_grad, part);
    } else {
      sum.add_(of_grad.mm(part));
    }
  }
  return sum.to(grad.scalar_type());
}

struct Linear : Function<Linear> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, bool is_dynamic) {
    at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({x, weight});
    context->saved_data["is_dynamic"] = is_dynamic;
    if (bias) context->saved_data["bias_dtype"] = bias->scalar_type();
    return linear_forward(x, weight, bias.value_or(at::Tensor()),
                          is_dynamic ? Input::kDynamicInt8 : Input::kAsItIs);
  }

  // Written in differentiable operations, so that it can be differentiated again.
  static variable_list backward(AutogradContext* context, variable_list grads) {
    const at::Tensor& grad = grads[0];
    if (!grad.defined()) return {at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
    const variable_list saved = context->get_saved_variables();
    const at::Tensor rows = as_matrix(grad);
    at::Tensor grad_x, grad_weight, grad_bias;
    if (context->needs_input_grad(0)) {
      grad_x = times_weight(rows, saved[1]).reshape(saved[0].sizes());
    }
    if (context->needs_input_grad(1)) {
      at::Tensor x = as_matrix(dequantize_ste(saved[0]));
      if (context->saved_data["is_dynamic"].toBool()) {
        x = fake_quantize_tokens(x, qint8, TokenAxis::kLastDim);
      }
      grad_weight = rows.t().mm(x).to(saved[1].scalar_type());
    }
    if (context->saved_data.count("bias_dtype") && context->needs_input_grad(2)) {
      grad_bias = rows.sum(0).to(context->saved_data["bias_dtype"].toScalarType());
    }
    return {grad_x, grad_weight, grad_bias, at::Tensor()};
  }
};

at::Tensor embedding_forward(const at::Tensor& weight, const at::Tensor& indices) {
  const at::ScalarType type = indices.scalar_type();
  if (!impl_of(weight)->weight->scheme() || !shows_whole_cell(weight) ||
      (type != at::kLong && type != at::kInt)) {
    return at::embedding(quantized_value(weight), indices);
  }
  std::vector<std::int64_t> sizes = indices.sizes().vec();
  sizes.insert(sizes.end(), weight.sizes().begin() + 1, weight.sizes().end());
  const at::Tensor flat = indices.reshape(-1).to(at::kLong);
  return impl_of(weight)->weight->decode_rows(flat, weight.scalar_type()).reshape(sizes);
}

struct Embedding : Function<Embedding> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& weight,
                            const at::Tensor& indices, std::int64_t padding_idx,
                            bool scale_grad_by_freq, bool sparse) {
    at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({indices});
    context->saved_data["rows"] = weight.size(0);
    context->saved_data["padding_idx"] = padding_idx;
    context->saved_data["scale_grad_by_freq"] = scale_grad_by_freq;
    context->saved_data["sparse"] = sparse;
    return embedding_forward(weight, indices);
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    const at::Tensor none;
    if (!grads[0].defined()) return {none, none, none, none, none};
    const at::Tensor grad = at::embedding_backward(
        grads[0], context->get_saved_variables()[0], context->saved_data["rows"].toInt(),
        context->saved_data["padding_idx"].toInt(),
        context->saved_data["scale_grad_by_freq"].toBool(), context->saved_data["sparse"].toBool());
    return {grad, none, none, none, none};
  }
};

}  // namespace

bool records_gradients() {
  return at::GradMode::is_enabled() && !c10::InferenceMode::is_enabled() &&
         !c10::impl::tls_is_dispatch_key_excluded(c10::DispatchKey::AutogradPrivateUse3);
}

at::Tensor straight_through(const at::Tensor& x, const Forward& forward) {
  if (records_gradients() && x.requires_grad()) return StraightThrough::apply(x, forward);
  return run_below_autograd(x, forward);
}

at::Tensor dequantize_ste(const at::Tensor& t) {
  return is_qtensor(t) ? straight_through(t, quantized_value) : t;
}

at::Tensor float_value_ste(const at::Tensor& t) { return straight_through(t, float_value); }

at::Tensor linear_ste(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                      bool is_dynamic, const at::Tensor& output_scale) {
  const bool graph =
      x.requires_grad() || weight.requires_grad() || (bias.defined() && bias.requires_grad());
  if (records_gradients() && graph) {
    return Linear::apply(x, weight, bias.defined() ? std::optional(bias) : std::nullopt,
                         is_dynamic);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return linear_forward(x, weight, bias, is_dynamic ? Input::kDynamicInt8 : Input::kAsItIs,
                        output_scale);
}

at::Tensor embedding_ste(const at::Tensor& weight, const at::Tensor& indices,
                         std::int64_t padding_idx, bool scale_grad_by_freq, bool sparse) {
  if (records_gradients() && weight.requires_grad()) {
    return Embedding::apply(weight, indices, padding_idx, scale_grad_by_freq, sparse);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return embedding_forward(weight, indices);
}

}  // namespace quantal
