#include "ops/plain_ops.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <quantal/quantizer.h>

#include "ops/canonical_weight.h"
#include "ops/cpu_weights.h"
#include "ops/fake_quantize.h"
#include "ops/plain_arguments.h"
#include "quantizers/weight_scheme.h"

namespace quantal {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using Parts = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// ---- linear -------------------------------------------------------------------------------------

at::Tensor linear_input_grad_op(const at::Tensor& grad, const at::Tensor& data,
                                const at::Tensor& scale, const MaybeTensor& shift,
                                c10::string_view qtype, std::int64_t group_size,
                                c10::SymInt columns) {
  static const auto op = handle<decltype(linear_input_grad_op)>("quantal::linear_input_grad");
  return op.call(grad, data, scale, shift, qtype, group_size, std::move(columns));
}

at::Tensor linear_any_device(const at::Tensor& x, const at::Tensor& data, const at::Tensor& scale,
                             const MaybeTensor& shift, const MaybeTensor& bias,
                             c10::string_view qtype, std::int64_t group_size, const MaybeTensor&,
                             c10::string_view activations, const MaybeTensor& input_scale) {
  const CanonicalMatrix weight("linear", data, scale, shift, qtype_of(qtype), group_size, x);
  return weight.linear(x, value_or_none(bias), activation_qtype(activations),
                       value_or_none(input_scale));
}

at::Tensor linear_meta(const at::Tensor& x, const at::Tensor&, const at::Tensor& scale,
                       const MaybeTensor&, const MaybeTensor&, c10::string_view,
                       std::int64_t group_size, const MaybeTensor&, c10::string_view,
                       const MaybeTensor&) {
  std::vector<c10::SymInt> sizes = x.sym_sizes().vec();
  TORCH_CHECK_VALUE(!sizes.empty(), "[quantal::linear] expected input of shape (…, in)");
  sizes.back() = group_size > 0 ? scale.sym_size(0) / ((sizes.back() + group_size - 1) / group_size)
                                : scale.sym_size(0);
  return x.new_empty_symint(sizes);
}

struct LinearFunction : Function<LinearFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const MaybeTensor& bias,
                            const MaybeTensor& latent, const at::Tensor& data,
                            const at::Tensor& scale, const MaybeTensor& shift,
                            const std::string& qtype, std::int64_t group_size,
                            const std::string& activations, const MaybeTensor& input_scale) {
    at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({x, data, scale, value_or_none(shift), value_or_none(input_scale)});
    context->saved_data["qtype"] = qtype;
    context->saved_data["group_size"] = group_size;
    context->saved_data["activations"] = activations;
    if (bias) context->saved_data["bias"] = bias->scalar_type();
    if (latent) context->saved_data["latent"] = latent->scalar_type();
    return linear_op(x, data, scale, shift, bias, qtype, group_size, latent, activations,
                     input_scale);
  }

  // Written in operators of the dispatcher, so that it can be traced and differentiated again.
  static variable_list backward(AutogradContext* context, variable_list grads) {
    variable_list out(10);
    if (!grads[0].defined()) return out;
    const variable_list saved = context->get_saved_variables();
    auto& data = context->saved_data;
    const at::Tensor& x = saved[0];
    const c10::SymInt columns = x.sym_size(-1);
    if (context->needs_input_grad(0)) {
      out[0] =
          linear_input_grad_op(grads[0], saved[1], saved[2], maybe(saved[3]),
                               data["qtype"].toStringRef(), data["group_size"].toInt(), columns);
    }
    // Edges are counted over the tensors that are there.
    const bool has_bias = data.count("bias") != 0, has_latent = data.count("latent") != 0;
    const at::Tensor rows = grads[0].reshape_symint({-1, grads[0].sym_size(-1)});
    if (has_bias && context->needs_input_grad(1)) {
      out[1] = rows.sum(0).to(data["bias"].toScalarType());
    }
    if (has_latent && context->needs_input_grad(has_bias ? 2 : 1)) {
      at::Tensor seen = x;
      const std::string& activations = data["activations"].toStringRef();
      if (!activations.empty()) seen = fake_quantize_op(x, activations, maybe(saved[4]), false);
      out[2] = rows.t().mm(seen.reshape_symint({-1, columns})).to(data["latent"].toScalarType());
    }
    return out;
  }
};

at::Tensor linear_autograd(const at::Tensor& x, const at::Tensor& data, const at::Tensor& scale,
                           const MaybeTensor& shift, const MaybeTensor& bias,
                           c10::string_view qtype, std::int64_t group_size,
                           const MaybeTensor& latent, c10::string_view activations,
                           const MaybeTensor& input_scale) {
  const at::Tensor added = value_or_none(bias), floats = value_or_none(latent);
  if (records({&x, &added, &floats})) {
    return LinearFunction::apply(x, bias, latent, data, scale, shift, std::string(qtype),
                                 group_size, std::string(activations), input_scale);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return linear_op(x, data, scale, shift, bias, qtype, group_size, latent, activations,
                   input_scale);
}

at::Tensor input_grad_any_device(const at::Tensor& grad, const at::Tensor& data,
                                 const at::Tensor& scale, const MaybeTensor& shift,
                                 c10::string_view qtype, std::int64_t group_size,
                                 c10::SymInt columns) {
  return CanonicalMatrix("linear_input_grad", data, scale, shift, qtype_of(qtype), group_size,
                         columns.expect_int())
      .times(grad);
}

at::Tensor input_grad_meta(const at::Tensor& grad, const at::Tensor&, const at::Tensor&,
                           const MaybeTensor&, c10::string_view, std::int64_t,
                           c10::SymInt columns) {
  std::vector<c10::SymInt> sizes = grad.sym_sizes().vec();
  sizes.back() = std::move(columns);
  return grad.new_empty_symint(sizes);
}

struct InputGradFunction : Function<InputGradFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& grad,
                            const at::Tensor& data, const at::Tensor& scale,
                            const MaybeTensor& shift, const std::string& qtype,
                            std::int64_t group_size, const c10::SymInt& columns) {
    at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({data, scale, value_or_none(shift)});
    context->saved_data["qtype"] = qtype;
    context->saved_data["group_size"] = group_size;
    return linear_input_grad_op(grad, data, scale, shift, qtype, group_size, columns);
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    variable_list out(7);
    if (!grads[0].defined()) return out;
    const variable_list saved = context->get_saved_variables();
    out[0] = linear_op(grads[0], saved[0], saved[1], maybe(saved[2]), std::nullopt,
                       context->saved_data["qtype"].toStringRef(),
                       context->saved_data["group_size"].toInt(), std::nullopt, "", std::nullopt);
    return out;
  }
};

at::Tensor input_grad_autograd(const at::Tensor& grad, const at::Tensor& data,
                               const at::Tensor& scale, const MaybeTensor& shift,
                               c10::string_view qtype, std::int64_t group_size,
                               c10::SymInt columns) {
  if (records({&grad})) {
    return InputGradFunction::apply(grad, data, scale, shift, std::string(qtype), group_size,
                                    columns);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return linear_input_grad_op(grad, data, scale, shift, qtype, group_size, columns);
}

// ---- decode, embedding --------------------------------------------------------------------------

at::Tensor decode_any_device(const at::Tensor& data, const at::Tensor& scale,
                             const MaybeTensor& shift, c10::string_view qtype,
                             std::int64_t group_size, at::IntArrayRef sizes, at::ScalarType dtype,
                             const MaybeTensor&) {
  WeightCodes codes =
      canonical_codes("decode", data, scale, shift, qtype_of(qtype), group_size, sizes);
  codes.wide = is_wide(codes.scale, codes.shift, codes.qtype.bits);
  return dequantize(codes, dtype);  // dense rows: compiled code counts on them
}

at::Tensor decode_meta(const at::Tensor& data, const at::Tensor&, const MaybeTensor&,
                       c10::string_view, std::int64_t, at::IntArrayRef sizes, at::ScalarType dtype,
                       const MaybeTensor&) {
  return data.new_empty(sizes, data.options().dtype(dtype));
}

struct DecodeFunction : Function<DecodeFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& data,
                            const at::Tensor& scale, const MaybeTensor& shift,
                            const std::string& qtype, std::int64_t group_size,
                            const std::vector<std::int64_t>& sizes, at::ScalarType dtype,
                            const at::Tensor& latent) {
    at::AutoDispatchBelowADInplaceOrView below;
    context->saved_data["dtype"] = latent.scalar_type();
    return decode_op(data, scale, shift, qtype, group_size, sizes, dtype, latent);
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    variable_list out(8);
    if (grads[0].defined()) out[7] = grads[0].to(context->saved_data["dtype"].toScalarType());
    return out;
  }
};

at::Tensor decode_autograd(const at::Tensor& data, const at::Tensor& scale,
                           const MaybeTensor& shift, c10::string_view qtype,
                           std::int64_t group_size, at::IntArrayRef sizes, at::ScalarType dtype,
                           const MaybeTensor& latent) {
  const at::Tensor floats = value_or_none(latent);
  if (records({&floats})) {
    return DecodeFunction::apply(data, scale, shift, std::string(qtype), group_size, sizes.vec(),
                                 dtype, floats);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return decode_op(data, scale, shift, qtype, group_size, sizes, dtype, latent);
}

at::Tensor embedding_any_device(const at::Tensor& indices, const at::Tensor& data,
                                const at::Tensor& scale, const MaybeTensor& shift,
                                c10::string_view qtype, std::int64_t group_size,
                                at::IntArrayRef sizes, at::ScalarType dtype) {
  const WeightCodes codes =
      canonical_codes("embedding", data, scale, shift, qtype_of(qtype), group_size, sizes);
  const at::Tensor flat = indices.reshape(-1).to(at::kLong);
  std::vector<std::int64_t> shape = indices.sizes().vec();
  shape.insert(shape.end(), sizes.begin() + 1, sizes.end());
  return decode_rows(codes, flat, dtype).reshape(shape).contiguous();
}

at::Tensor embedding_meta(const at::Tensor& indices, const at::Tensor& data, const at::Tensor&,
                          const MaybeTensor&, c10::string_view, std::int64_t, at::IntArrayRef sizes,
                          at::ScalarType dtype) {
  std::vector<c10::SymInt> shape = indices.sym_sizes().vec();
  for (const std::int64_t size : sizes.slice(1)) shape.emplace_back(size);
  return data.new_empty_symint(shape, data.options().dtype(dtype));
}

// ---- activations --------------------------------------------------------------------------------

at::Tensor fake_quantize_any_device(const at::Tensor& x, c10::string_view qtype,
                                    const MaybeTensor& scale, bool per_sample) {
  const auto type = activation_qtype(qtype);
  TORCH_CHECK_VALUE(type, "[quantal::fake_quantize] expected the name of a qtype");
  if (scale) return fake_quantize_static(x, *type, *scale);
  return fake_quantize_dynamic(x, *type, per_sample ? TokenAxis::kFirstDim : TokenAxis::kLastDim);
}

at::Tensor fake_quantize_meta(const at::Tensor& x, c10::string_view, const MaybeTensor&, bool) {
  return at::empty_like(x);
}

struct FakeQuantizeFunction : Function<FakeQuantizeFunction> {
  static at::Tensor forward(AutogradContext*, const at::Tensor& x, const std::string& qtype,
                            const MaybeTensor& scale, bool per_sample) {
    at::AutoDispatchBelowADInplaceOrView below;
    return fake_quantize_op(x, qtype, scale, per_sample);
  }
  static variable_list backward(AutogradContext*, variable_list grads) {
    return {grads[0], at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

at::Tensor fake_quantize_autograd(const at::Tensor& x, c10::string_view qtype,
                                  const MaybeTensor& scale, bool per_sample) {
  if (records({&x})) return FakeQuantizeFunction::apply(x, std::string(qtype), scale, per_sample);
  at::AutoDispatchBelowADInplaceOrView below;
  return fake_quantize_op(x, qtype, scale, per_sample);
}

// ---- weights ------------------------------------------------------------------------------------

// `options` are those of hqq, in the order of HqqOptions; empty: the defaults.
WeightScheme scheme_of(c10::string_view qtype, std::int64_t group_size, c10::string_view quantizer,
                       at::ArrayRef<double> options) {
  WeightScheme scheme{qtype_of(qtype), group_size, nullptr};
  scheme.quantizer = quantizer.empty() ? default_quantizer(scheme.qtype)
                                       : find_quantizer({quantizer.data(), quantizer.size()});
  if (quantizer == "hqq" && !options.empty()) {
    TORCH_CHECK_VALUE(options.size() == 4, "[quantal::encode] expected 4 options of hqq, got ",
                      options.size());
    scheme.quantizer = hqq_quantizer({.lp_norm = options[0],
                                      .beta = options[1],
                                      .kappa = options[2],
                                      .iterations = static_cast<int>(options[3])});
  }
  TORCH_CHECK_VALUE(scheme.quantizer && scheme.quantizer->supports(scheme.qtype),
                    "[quantal::encode] expected a quantizer for ", qtype, ", got '", quantizer,
                    "'");
  TORCH_CHECK_VALUE(group_size == 0 || (group_size > 0 && scheme.qtype.is_affine()),
                    "[quantal::encode] expected group size 0 for ", qtype, ", got ", group_size);
  return scheme;
}

Parts encode_any_device(const at::Tensor& weight, c10::string_view qtype, std::int64_t group_size,
                        c10::string_view quantizer, at::ArrayRef<double> options) {
  TORCH_CHECK_VALUE(weight.dim() >= 2 && at::isFloatingType(weight.scalar_type()),
                    "[quantal::encode] expected a float weight of two dimensions or more, got ",
                    weight.scalar_type(), " ", weight.sizes());
  const WeightCodes codes = quantize(weight, scheme_of(qtype, group_size, quantizer, options));
  return {codes.data, codes.scale,
          codes.shift.defined() ? codes.shift : at::empty({0}, codes.scale.options())};
}

Parts encode_meta(const at::Tensor& weight, c10::string_view qtype, std::int64_t group_size,
                  c10::string_view quantizer, at::ArrayRef<double> options) {
  const WeightScheme scheme = scheme_of(qtype, group_size, quantizer, options);
  const auto scales = scale_shape(scheme.qtype, weight.sizes(), group_size);
  return {weight.new_empty(data_shape(scheme.qtype, weight.sizes(), group_size),
                           weight.options().dtype(code_dtype(scheme.qtype))),
          weight.new_empty(scales),
          scheme.qtype.is_affine() ? weight.new_empty(scales) : weight.new_empty({0})};
}

Parts encode_autograd(const at::Tensor& weight, c10::string_view qtype, std::int64_t group_size,
                      c10::string_view quantizer, at::ArrayRef<double> options) {
  static const auto op = handle<decltype(encode_autograd)>("quantal::encode");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(weight, qtype, group_size, quantizer, options);
}

at::Tensor encode_with_any_device(const at::Tensor& weight, const at::Tensor& scale,
                                  const MaybeTensor& shift, c10::string_view qtype,
                                  std::int64_t group_size) {
  const QType type = qtype_of(qtype);
  return encode_groups(to_groups(weight, group_size), weight.sizes(), type, group_size,
                       scale.reshape({-1, 1}), shift ? shift->reshape({-1, 1}) : at::Tensor())
      .data;
}

at::Tensor encode_with_meta(const at::Tensor& weight, const at::Tensor&, const MaybeTensor&,
                            c10::string_view qtype, std::int64_t group_size) {
  const QType type = qtype_of(qtype);
  return weight.new_empty(data_shape(type, weight.sizes(), group_size),
                          weight.options().dtype(code_dtype(type)));
}

at::Tensor encode_with_autograd(const at::Tensor& weight, const at::Tensor& scale,
                                const MaybeTensor& shift, c10::string_view qtype,
                                std::int64_t group_size) {
  static const auto op = handle<decltype(encode_with_autograd)>("quantal::encode_with");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(weight, scale, shift, qtype, group_size);
}

bool scales_fit(const at::Tensor& scale, const MaybeTensor& shift, c10::string_view qtype,
                at::ScalarType dtype) {
  WeightCodes codes;
  codes.qtype = qtype_of(qtype);
  codes.scale = scale;
  codes.shift = value_or_none(shift);
  return round_scales(codes, dtype).scale.scalar_type() == dtype;
}

// ---- autocast: a linear computes in the type that it asks for ----------------------------------

template <c10::DispatchKey key, at::DeviceType device>
at::Tensor linear_autocast(const at::Tensor& x, const at::Tensor& data, const at::Tensor& scale,
                           const MaybeTensor& shift, const MaybeTensor& bias,
                           c10::string_view qtype, std::int64_t group_size,
                           const MaybeTensor& latent, c10::string_view activations,
                           const MaybeTensor& input_scale) {
  c10::impl::ExcludeDispatchKeyGuard once(key);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  return linear_op(at::autocast::cached_cast(dtype, x, device), data, scale, shift, bias, qtype,
                   group_size, latent, activations, input_scale);
}

}  // namespace

at::Tensor fake_quantize_op(const at::Tensor& x, c10::string_view qtype, const MaybeTensor& scale,
                            bool per_sample) {
  static const auto op = handle<decltype(fake_quantize_op)>("quantal::fake_quantize");
  return op.call(x, qtype, scale, per_sample);
}

at::Tensor decode_op(const at::Tensor& data, const at::Tensor& scale, const MaybeTensor& shift,
                     c10::string_view qtype, std::int64_t group_size, at::IntArrayRef sizes,
                     at::ScalarType dtype, const MaybeTensor& latent) {
  static const auto op = handle<decltype(decode_op)>("quantal::decode");
  return op.call(data, scale, shift, qtype, group_size, sizes, dtype, latent);
}

at::Tensor linear_op(const at::Tensor& x, const at::Tensor& data, const at::Tensor& scale,
                     const MaybeTensor& shift, const MaybeTensor& bias, c10::string_view qtype,
                     std::int64_t group_size, const MaybeTensor& latent,
                     c10::string_view activations, const MaybeTensor& input_scale) {
  static const auto op = handle<decltype(linear_op)>("quantal::linear");
  return op.call(x, data, scale, shift, bias, qtype, group_size, latent, activations, input_scale);
}

TORCH_LIBRARY_FRAGMENT(quantal, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "linear(Tensor x, Tensor data, Tensor scale, Tensor? shift, Tensor? bias, str qtype, "
      "int group_size, Tensor? latent=None, str activations='', Tensor? input_scale=None) "
      "-> Tensor",
      tags);
  m.def(
      "linear_input_grad(Tensor grad, Tensor data, Tensor scale, Tensor? shift, str qtype, "
      "int group_size, SymInt columns) -> Tensor",
      tags);
  m.def(
      "decode(Tensor data, Tensor scale, Tensor? shift, str qtype, int group_size, int[] sizes, "
      "ScalarType dtype, Tensor? latent=None) -> Tensor",
      tags);
  m.def(
      "embedding(Tensor indices, Tensor data, Tensor scale, Tensor? shift, str qtype, "
      "int group_size, int[] sizes, ScalarType dtype) -> Tensor",
      tags);
  m.def("fake_quantize(Tensor x, str qtype, Tensor? scale=None, bool per_sample=False) -> Tensor",
        tags);
  m.def(
      "encode(Tensor weight, str qtype, int group_size, str quantizer='', float[] options=[]) "
      "-> (Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "encode_with(Tensor weight, Tensor scale, Tensor? shift, str qtype, int group_size) "
      "-> Tensor",
      tags);
  m.def("check_finite(Tensor weight, str name) -> ()",
        [](const at::Tensor& weight, c10::string_view name) {
          if (!weight.is_meta()) check_finite(weight, {name.data(), name.size()});
        });
  m.def("scales_fit(Tensor scale, Tensor? shift, str qtype, ScalarType dtype) -> bool", scales_fit);
  m.def("default_group_size(str qtype, int row_length) -> int",
        [](c10::string_view qtype, std::int64_t row_length) {
          return default_group_size(qtype_of(qtype), row_length);
        });
}

TORCH_LIBRARY_IMPL(quantal, CompositeExplicitAutograd, m) {
  m.impl("linear", linear_any_device);
  m.impl("linear_input_grad", input_grad_any_device);
  m.impl("decode", decode_any_device);
  m.impl("embedding", embedding_any_device);
  m.impl("fake_quantize", fake_quantize_any_device);
  m.impl("encode", encode_any_device);
  m.impl("encode_with", encode_with_any_device);
}

TORCH_LIBRARY_IMPL(quantal, AutocastCPU, m) {
  m.impl("linear", linear_autocast<c10::DispatchKey::AutocastCPU, at::kCPU>);
}

TORCH_LIBRARY_IMPL(quantal, AutocastCUDA, m) {
  m.impl("linear", linear_autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
}

TORCH_LIBRARY_IMPL(quantal, Meta, m) {
  m.impl("linear", linear_meta);
  m.impl("linear_input_grad", input_grad_meta);
  m.impl("decode", decode_meta);
  m.impl("embedding", embedding_meta);
  m.impl("fake_quantize", fake_quantize_meta);
  m.impl("encode", encode_meta);
  m.impl("encode_with", encode_with_meta);
}

TORCH_LIBRARY_IMPL(quantal, Autograd, m) {
  m.impl("linear", linear_autograd);
  m.impl("linear_input_grad", input_grad_autograd);
  m.impl("decode", decode_autograd);
  m.impl("fake_quantize", fake_quantize_autograd);
  m.impl("encode", encode_autograd);
  m.impl("encode_with", encode_with_autograd);
}

}  // namespace quantal
