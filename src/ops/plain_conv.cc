#include "ops/plain_conv.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/canonical_weight.h"
#include "ops/cpu_kernels.h"
#include "ops/cpu_weights.h"
#include "ops/fake_quantize.h"
#include "ops/packed_conv.h"
#include "ops/plain_arguments.h"
#include "ops/weight_only_conv.h"

namespace quantal {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

void check_input(const at::Tensor& x, const at::Tensor& data, const MaybeTensor& bias,
                 at::IntArrayRef sizes, std::int64_t groups) {
  TORCH_CHECK_VALUE(sizes.size() >= 3 && groups >= 1 && sizes[0] % groups == 0,
                    "[quantal::convolution] expected a weight of shape (out, in, …) whose rows "
                    "divide into groups, got ",
                    sizes, " and ", groups, " groups");
  TORCH_CHECK_VALUE(
      x.dim() == static_cast<std::int64_t>(sizes.size()) && x.size(1) == sizes[1] * groups,
      "[quantal::convolution] expected input of shape (batch, ", sizes[1] * groups,
      ", …) for a weight of shape ", sizes, " in ", groups, " groups, got ", x.sizes());
  TORCH_CHECK_VALUE(at::isFloatingType(x.scalar_type()) && x.device() == data.device(),
                    "[quantal::convolution] expected a float input on ", data.device(), ", got ",
                    x.scalar_type(), " on ", x.device());
  TORCH_CHECK_VALUE(!bias || bias->sizes() == sizes.slice(0, 1),
                    "[quantal::convolution] expected a bias of shape ", sizes.slice(0, 1), ", got ",
                    bias ? bias->sizes() : at::IntArrayRef());
}

ConvParams params_of(at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                     std::int64_t groups) {
  return {.stride = stride.vec(),
          .padding = padding.vec(),
          .dilation = dilation.vec(),
          .output_padding = std::vector<std::int64_t>(stride.size(), 0),
          .groups = groups};
}

// x as int8 codes; nothing where a static scale meets a NaN.
std::optional<SampleCodes> codes_of(const at::Tensor& x, const MaybeTensor& scale) {
  if (!scale) return quantize_samples(x);
  const auto codes = int8_codes(x, scale->item<float>());
  if (!codes) return std::nullopt;
  return SampleCodes{*codes, scale->to(at::kFloat).reshape({1}).expand({x.size(0)})};
}

// By products of codes; nothing where kernels do not take it or floats take less time.
std::optional<at::Tensor> integer_result(const at::Tensor& x, const WeightCodes& weight,
                                         const ConvParams& params, const MaybeTensor& x_scale,
                                         const at::Tensor& bias) {
  const auto shape = conv_shape(x.sizes(), weight.sizes, params);
  if (!shape || weight.qtype.is_floating_point || !PackedWeight::takes_activations(x) ||
      !PackedWeight::takes(weight) ||
      !kernels::gains_from_codes(kernel_isa(), *shape, kernels::PackedLayout(spec_of(weight)))) {
    return std::nullopt;
  }
  const auto codes = codes_of(x, x_scale);
  if (!codes) return std::nullopt;
  return integer_convolution(PackedWeight(weight), 0, *shape, *codes, x.scalar_type(), bias);
}

at::Tensor convolution_any_device(const at::Tensor& x, const at::Tensor& data,
                                  const at::Tensor& scale, const MaybeTensor& shift,
                                  const MaybeTensor& bias, c10::string_view qtype,
                                  std::int64_t group_size, at::IntArrayRef sizes,
                                  at::IntArrayRef stride, at::IntArrayRef padding,
                                  at::IntArrayRef dilation, std::int64_t groups, const MaybeTensor&,
                                  c10::string_view activations, const MaybeTensor& input_scale) {
  WeightCodes weight =
      canonical_codes("convolution", data, scale, shift, qtype_of(qtype), group_size, sizes);
  weight.wide = is_wide(weight.scale, weight.shift, weight.qtype.bits);
  check_input(x, data, bias, sizes, groups);
  const ConvParams params = params_of(stride, padding, dilation, groups);
  const at::ScalarType dtype = x.scalar_type();
  const MaybeTensor added = bias ? MaybeTensor(bias->to(dtype)) : std::nullopt;
  const auto type = activation_qtype(activations);
  if (type == qint8) {
    const auto y = integer_result(x, weight, params, input_scale, value_or_none(added));
    if (y) return *y;
  }
  at::Tensor input = x;
  if (type) {
    input = input_scale ? fake_quantize_static(x, *type, *input_scale)
                        : fake_quantize_dynamic(x, *type, TokenAxis::kFirstDim);
  }
  return weight_only_convolution(input, weight, added, params);
}

// The sizes, and errors of sizes that do not fit, are those of at::convolution() on no device.
at::Tensor convolution_meta(const at::Tensor& x, const at::Tensor& data, const at::Tensor&,
                            const MaybeTensor&, const MaybeTensor&, c10::string_view, std::int64_t,
                            at::IntArrayRef sizes, at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation, std::int64_t groups, const MaybeTensor&,
                            c10::string_view, const MaybeTensor&) {
  const at::Tensor weight = data.new_empty(sizes, x.options());
  const at::Tensor like =
      aten_convolution(x, weight, std::nullopt, params_of(stride, padding, dilation, groups));
  return at::empty_symint(like.sym_sizes(), x.options(), x.suggest_memory_format());
}

struct ConvolutionFunction : Function<ConvolutionFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const MaybeTensor& bias,
                            const MaybeTensor& latent, const at::Tensor& data,
                            const at::Tensor& scale, const MaybeTensor& shift,
                            const std::string& qtype, std::int64_t group_size,
                            const std::vector<std::int64_t>& sizes, const ConvParams& params,
                            const std::string& activations, const MaybeTensor& input_scale) {
    at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({x, data, scale, value_or_none(shift), value_or_none(input_scale)});
    auto& saved = context->saved_data;
    saved["qtype"] = qtype;
    saved["group_size"] = group_size;
    saved["sizes"] = sizes;
    saved["stride"] = params.stride;
    saved["padding"] = params.padding;
    saved["dilation"] = params.dilation;
    saved["groups"] = params.groups;
    saved["activations"] = activations;
    if (bias) saved["bias"] = bias->scalar_type();
    if (latent) saved["latent"] = latent->scalar_type();
    return convolution_op(x, data, scale, shift, bias, qtype, group_size, sizes, params.stride,
                          params.padding, params.dilation, params.groups, latent, activations,
                          input_scale);
  }

  // Of the float values, in operators of the dispatcher.
  static variable_list backward(AutogradContext* context, variable_list grads) {
    variable_list out(12);
    if (!grads[0].defined()) return out;
    const variable_list saved = context->get_saved_variables();
    auto& data = context->saved_data;
    // Edges are counted over the tensors that are there.
    const bool has_bias = data.count("bias") != 0, has_latent = data.count("latent") != 0;
    const std::array<bool, 3> wanted{
        context->needs_input_grad(0),
        has_latent && context->needs_input_grad(has_bias ? 2 : 1),
        has_bias && context->needs_input_grad(1),
    };
    at::Tensor x = saved[0];
    const std::string& activations = data["activations"].toStringRef();
    if (!activations.empty()) {
      x = fake_quantize_op(x, activations, maybe(saved[4]), /*per_sample=*/true);
    }
    const std::vector<std::int64_t> sizes = data["sizes"].toIntVector();
    const ConvParams params = params_of(data["stride"].toIntVector(), data["padding"].toIntVector(),
                                        data["dilation"].toIntVector(), data["groups"].toInt());
    const std::string& qtype = data["qtype"].toStringRef();
    const std::int64_t group_size = data["group_size"].toInt();
    if (!wanted[1] && is_readable(saved[1])) {
      WeightCodes codes = canonical_codes("convolution", saved[1], saved[2], maybe(saved[3]),
                                          qtype_of(qtype), group_size, sizes);
      codes.wide = is_wide(codes.scale, codes.shift, codes.qtype.bits);
      if (wanted[0]) {
        out[0] =
            convolution_input_grad(grads[0], x, sizes, decoding(codes, x.scalar_type()), params);
      }
      if (wanted[2]) out[1] = convolution_bias_grad(grads[0]).to(data["bias"].toScalarType());
      return out;
    }
    const at::Tensor weight = decode_op(saved[1], saved[2], maybe(saved[3]), qtype, group_size,
                                        sizes, x.scalar_type(), std::nullopt);
    const std::array<std::int64_t, 1> bias_size{sizes[0]};
    auto [grad_x, grad_weight, grad_bias] = at::convolution_backward(
        grads[0], x, weight, at::OptionalIntArrayRef(bias_size), params.stride, params.padding,
        params.dilation, params.transposed, params.output_padding, params.groups, wanted);
    out[0] = grad_x;
    if (wanted[2]) out[1] = grad_bias.to(data["bias"].toScalarType());
    if (wanted[1]) out[2] = grad_weight.to(data["latent"].toScalarType());
    return out;
  }
};

at::Tensor convolution_autograd(
    const at::Tensor& x, const at::Tensor& data, const at::Tensor& scale, const MaybeTensor& shift,
    const MaybeTensor& bias, c10::string_view qtype, std::int64_t group_size, at::IntArrayRef sizes,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, std::int64_t groups,
    const MaybeTensor& latent, c10::string_view activations, const MaybeTensor& input_scale) {
  const at::Tensor added = value_or_none(bias), floats = value_or_none(latent);
  if (records({&x, &added, &floats})) {
    return ConvolutionFunction::apply(
        x, bias, latent, data, scale, shift, std::string(qtype), group_size, sizes.vec(),
        params_of(stride, padding, dilation, groups), std::string(activations), input_scale);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return convolution_op(x, data, scale, shift, bias, qtype, group_size, sizes, stride, padding,
                        dilation, groups, latent, activations, input_scale);
}

template <c10::DispatchKey key, at::DeviceType device>
at::Tensor convolution_autocast(
    const at::Tensor& x, const at::Tensor& data, const at::Tensor& scale, const MaybeTensor& shift,
    const MaybeTensor& bias, c10::string_view qtype, std::int64_t group_size, at::IntArrayRef sizes,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, std::int64_t groups,
    const MaybeTensor& latent, c10::string_view activations, const MaybeTensor& input_scale) {
  c10::impl::ExcludeDispatchKeyGuard once(key);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  return convolution_op(at::autocast::cached_cast(dtype, x, device), data, scale, shift, bias,
                        qtype, group_size, sizes, stride, padding, dilation, groups, latent,
                        activations, input_scale);
}

}  // namespace

at::Tensor convolution_op(const at::Tensor& x, const at::Tensor& data, const at::Tensor& scale,
                          const MaybeTensor& shift, const MaybeTensor& bias, c10::string_view qtype,
                          std::int64_t group_size, at::IntArrayRef sizes, at::IntArrayRef stride,
                          at::IntArrayRef padding, at::IntArrayRef dilation, std::int64_t groups,
                          const MaybeTensor& latent, c10::string_view activations,
                          const MaybeTensor& input_scale) {
  static const auto op = handle<decltype(convolution_op)>("quantal::convolution");
  return op.call(x, data, scale, shift, bias, qtype, group_size, sizes, stride, padding, dilation,
                 groups, latent, activations, input_scale);
}

TORCH_LIBRARY_FRAGMENT(quantal, m) {
  m.def(
      "convolution(Tensor x, Tensor data, Tensor scale, Tensor? shift, Tensor? bias, str qtype, "
      "int group_size, int[] sizes, int[] stride, int[] padding, int[] dilation, int groups, "
      "Tensor? latent=None, str activations='', Tensor? input_scale=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(quantal, CompositeExplicitAutograd, m) {
  m.impl("convolution", convolution_any_device);
}

TORCH_LIBRARY_IMPL(quantal, AutocastCPU, m) {
  m.impl("convolution", convolution_autocast<c10::DispatchKey::AutocastCPU, at::kCPU>);
}

TORCH_LIBRARY_IMPL(quantal, AutocastCUDA, m) {
  m.impl("convolution", convolution_autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
}

TORCH_LIBRARY_IMPL(quantal, Meta, m) { m.impl("convolution", convolution_meta); }

TORCH_LIBRARY_IMPL(quantal, Autograd, m) { m.impl("convolution", convolution_autograd); }

}  // namespace quantal
