#include <quantal/qtensor.h>

#include <ATen/ATen.h>

#include "quantizers/weight_scheme.h"
#include "tensor/activation.h"
#include "tensor/autograd.h"
#include "tensor/dispatch_log.h"
#include "tensor/fallback.h"
#include "tensor/qtensor_impl.h"
#include "tensor/weights.h"

namespace quantal {
namespace {

void check_weight_dtype(at::ScalarType dtype, const char* function) {
  TORCH_CHECK_VALUE(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
      "[quantal::", function,
      "] expected a weight of dtype float32, float64, bfloat16 or float16, got ", dtype);
}

void check_part(bool holds, const std::string& name, const char* part, const std::string& wanted,
                const std::string& got) {
  TORCH_CHECK_VALUE(holds, "[quantal::weight_from_parts] '", name, "': expected ", part, " ",
                    wanted, ", got ", got);
}

std::string shape_text(at::IntArrayRef shape) {
  std::ostringstream text;
  text << shape;
  return text.str();
}

void check_data(const QuantizedParts& parts, at::IntArrayRef sizes, const std::string& name) {
  const at::ScalarType dtype = code_dtype(parts.qtype);
  check_part(parts.data.defined() && parts.data.scalar_type() == dtype, name, "data of dtype",
             at::toString(dtype),
             parts.data.defined() ? at::toString(parts.data.scalar_type()) : "none");
  const auto shape = data_shape(parts.qtype, sizes, parts.group_size);
  check_part(parts.data.sizes() == at::IntArrayRef(shape), name, "data of shape", shape_text(shape),
             shape_text(parts.data.sizes()));
  if (parts.qtype.is_floating_point) {
    check_part(parts.data.to(at::kFloat).isfinite().all().item<bool>(), name, "data",
               "to be finite", "NaN or Inf");
  }
}

// A scale or shift of the right dtype and shape. Rows of length one may come without dimensions.
at::Tensor checked_scale(const at::Tensor& part, const char* what, const QuantizedParts& parts,
                         at::IntArrayRef sizes, const std::string& name) {
  check_part(part.defined(), name, what, "to be there", "none");
  check_part(part.device() == parts.data.device(), name, what, "on the device of the data",
             part.device().str());
  check_part(at::isFloatingType(part.scalar_type()) && part.element_size() > 1, name, what,
             "of a floating-point dtype", at::toString(part.scalar_type()));
  const auto shape = scale_shape(parts.qtype, sizes, parts.group_size);
  const bool is_one = part.dim() == 0 && sizes[0] == 1 && c10::multiply_integers(shape) == 1;
  check_part(is_one || part.sizes() == at::IntArrayRef(shape), name, what,
             "of shape " + shape_text(shape), shape_text(part.sizes()));
  check_part(part.isfinite().all().item<bool>(), name, what, "to be finite", "NaN or Inf");
  return part.detach().reshape(shape).contiguous();
}

}  // namespace

WeightScheme resolve_scheme(const at::Tensor& weight, const WeightOptions& options,
                            const std::string& name) {
  WeightScheme scheme{options.qtype, 0, options.quantizer};
  if (!scheme.quantizer) scheme.quantizer = default_quantizer(options.qtype);
  TORCH_CHECK_VALUE(scheme.quantizer->supports(options.qtype), "[quantal::quantize] '", name,
                    "': quantizer '", scheme.quantizer->name(), "' does not support ",
                    options.qtype.name);
  TORCH_CHECK_VALUE(weight.dim() >= 2, "[quantal::quantize] '", name,
                    "': expected a weight of two dimensions or more, got shape ", weight.sizes());
  const std::int64_t row = c10::multiply_integers(weight.sizes().slice(1));
  if (!options.group_size) {
    scheme.group_size = default_group_size(options.qtype, row);
    return scheme;
  }
  const std::int64_t group = *options.group_size;
  TORCH_CHECK_VALUE(group >= 0 && (group == 0 || options.qtype.is_affine()),
                    "[quantal::quantize] '", name, "': expected group size 0 for ",
                    options.qtype.name, ", got ", group);
  TORCH_CHECK_VALUE(group == 0 || row % group == 0 || options.allow_short_group,
                    "[quantal::quantize] '", name,
                    "': expected a group size that divides the row "
                    "of ",
                    row, " elements (or allow_short_group), got ", group);
  scheme.group_size = row == 0 ? 0 : group;
  return scheme;
}

bool is_quantized(const at::Tensor& tensor) {
  return is_qtensor(tensor) && (is_activation(tensor) || impl_of(tensor)->weight->scheme());
}

bool is_live(const at::Tensor& tensor) {
  return is_weight(tensor) && impl_of(tensor)->weight->scheme() && impl_of(tensor)->weight->live();
}

bool is_frozen(const at::Tensor& tensor) {
  return is_weight(tensor) && !impl_of(tensor)->weight->live();
}

at::Tensor quantize_weight(const at::Tensor& weight, const WeightOptions& options) {
  TORCH_CHECK_VALUE(!is_qtensor(weight),
                    "[quantal::quantize_weight] expected a float tensor, got "
                    "a quantized one: dequantize() it first");
  check_weight_dtype(weight.scalar_type(), "quantize_weight");
  const WeightScheme scheme = resolve_scheme(weight, options, "weight");
  cover_new_operators();
  return straight_through(weight, [&](const at::Tensor& value) {
    auto codes = std::make_shared<const WeightCodes>(quantize_finite(value, scheme, "weight"));
    return make_weight(std::make_shared<WeightCell>(scheme, std::move(codes)), value.scalar_type());
  });
}

at::Tensor quantize_weight_with(const at::Tensor& weight, const at::Tensor& scale,
                                const at::Tensor& shift, const QType& qtype,
                                std::int64_t group_size) {
  TORCH_CHECK_VALUE(!is_qtensor(weight) && weight.dim() >= 2,
                    "[quantal::quantize_weight_with] expected a float tensor of two dimensions or "
                    "more, got ",
                    weight.sizes());
  check_weight_dtype(weight.scalar_type(), "quantize_weight_with");
  TORCH_CHECK_VALUE(shift.defined() == qtype.is_affine(),
                    "[quantal::quantize_weight_with] expected a shift for qint2 and qint4 alone, "
                    "got ",
                    qtype.name);
  const at::Tensor steps = scale.detach().reshape(scale_shape(qtype, weight.sizes(), group_size));
  // Integer shifts are zero-points.
  at::Tensor offsets = shift;
  if (shift.defined()) {
    offsets = shift.detach().reshape(steps.sizes()).to(steps.scalar_type());
    if (at::isIntegralType(shift.scalar_type(), /*includeBool=*/false)) offsets = offsets * steps;
  }
  check_finite(weight, "weight");
  const at::Tensor column = steps.reshape({-1, 1});
  return straight_through(weight, [&](const at::Tensor& value) {
    const WeightCodes codes =
        encode_groups(to_groups(value, group_size), value.sizes(), qtype, group_size, column,
                      offsets.defined() ? offsets.reshape({-1, 1}) : offsets);
    return weight_from_parts({qtype, group_size, codes.data, codes.scale, codes.shift},
                             value.sizes(), value.scalar_type());
  });
}

at::Tensor make_live_weight(const at::Tensor& weight, std::optional<WeightScheme> scheme) {
  cover_new_operators();
  c10::InferenceMode normal(false);
  const at::Tensor latent = weight.is_inference() ? weight.clone() : weight.detach();
  at::Tensor live =
      make_weight(std::make_shared<WeightCell>(std::move(scheme), latent), weight.scalar_type());
  live.set_requires_grad(weight.requires_grad());
  return live;
}

at::Tensor live_weight(const at::Tensor& weight, const WeightOptions& options) {
  TORCH_CHECK_VALUE(!is_qtensor(weight),
                    "[quantal::live_weight] expected a float tensor, got a "
                    "quantized one");
  check_weight_dtype(weight.scalar_type(), "live_weight");
  const WeightScheme scheme = resolve_scheme(weight, options, "weight");
  check_finite(weight, "weight");
  return make_live_weight(weight, scheme);
}

void freeze(const at::Tensor& weight) {
  TORCH_CHECK_VALUE(is_weight(weight) && impl_of(weight)->weight->scheme(),
                    "[quantal::freeze] expected a quantized weight");
  QTensorImpl* impl = impl_of(weight);
  if (!impl->weight->live()) return;
  check_finite(impl->weight->latent(), "weight");
  c10::InferenceMode normal(false);
  auto codes = weight_codes(weight);
  if (weight.is_leaf()) {
    weight.mutable_grad() = at::Tensor();
    weight.set_requires_grad(false);
  }
  impl->weight->freeze(std::move(codes));
}

at::Tensor quantize_activation(const at::Tensor& x, const QType& qtype, const at::Tensor& scale) {
  TORCH_CHECK_VALUE(!is_qtensor(x), "[quantal::quantize_activation] expected a float tensor");
  TORCH_CHECK_VALUE(at::isFloatingType(x.scalar_type()),
                    "[quantal::quantize_activation] expected a float tensor, got ",
                    x.scalar_type());
  TORCH_CHECK_VALUE(!qtype.is_affine(),
                    "[quantal::quantize_activation] expected an 8-bit qtype, got ", qtype.name);
  const bool one = scale.defined() && scale.numel() == 1;
  const float value = one ? scale.item<float>() : 0;
  TORCH_CHECK_VALUE(std::isfinite(value) && value > 0,
                    "[quantal::quantize_activation] expected one finite positive scale that fp32 "
                    "holds, got ",
                    one ? std::to_string(value) : "none or several");
  cover_new_operators();
  return quantize_activation_ste(x, qtype, scale.detach().to(at::kFloat).reshape({}));
}

at::Tensor dequantize(const at::Tensor& tensor) { return dequantize_ste(tensor); }

at::Tensor latent(const at::Tensor& weight) {
  TORCH_CHECK_VALUE(is_weight(weight) && impl_of(weight)->weight->live(),
                    "[quantal::latent] expected a live quantized weight");
  return shows_whole_cell(weight) ? impl_of(weight)->weight->latent() : latent_of(weight);
}

QuantizedParts parts(const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(is_quantized(tensor), "[quantal::parts] expected a quantized tensor");
  if (is_weight(tensor)) {
    TORCH_CHECK_VALUE(shows_whole_cell(tensor),
                      "[quantal::parts] expected a whole weight, got a view of one of shape ",
                      impl_of(tensor)->weight->sizes());
    const auto codes = weight_codes(tensor);
    return {codes->qtype, codes->group_size, codes->data, codes->scale, codes->shift};
  }
  const ActivationCell& cell = *impl_of(tensor)->activation;
  TORCH_CHECK_VALUE(cell.codes.defined(),
                    "[quantal::parts] the activation was written in place and holds floats");
  return {cell.qtype, 0, activation_codes(tensor), cell.scale, {}};
}

at::Tensor weight_from_parts(const QuantizedParts& parts, at::IntArrayRef sizes,
                             at::ScalarType dtype, const std::string& name) {
  TORCH_CHECK_VALUE(sizes.size() >= 2, "[quantal::weight_from_parts] '", name,
                    "': expected two dimensions or more, got ", sizes);
  for (const std::int64_t size : sizes) {
    TORCH_CHECK_VALUE(size >= 0, "[quantal::weight_from_parts] '", name, "': got a size of ", size);
  }
  check_weight_dtype(dtype, "weight_from_parts");
  TORCH_CHECK_VALUE(parts.group_size >= 0 && (parts.group_size == 0 || parts.qtype.is_affine()),
                    "[quantal::weight_from_parts] '", name, "': group size ", parts.group_size,
                    " does not fit ", parts.qtype.name);
  check_data(parts, sizes, name);
  auto codes = std::make_shared<WeightCodes>();
  *codes = {parts.qtype, sizes.vec(), parts.group_size, parts.data.contiguous(), {}, {}};
  codes->scale = checked_scale(parts.scale, "scale", parts, sizes, name);
  check_part((codes->scale > 0).all().item<bool>(), name, "scale", "to be positive",
             "zero or negative");
  if (parts.qtype.is_affine()) {
    at::Tensor shift = parts.shift;
    // Integer shifts are zero-points: value = scale * (code - zero_point).
    if (shift.defined() && at::isIntegralType(shift.scalar_type(), /*includeBool=*/false)) {
      shift = shift.to(parts.scale.scalar_type()) * parts.scale;
    }
    codes->shift = checked_scale(shift, "shift", parts, sizes, name);
    codes->wide = is_wide(codes->scale, codes->shift, parts.qtype.bits);
  } else {
    check_part(!parts.shift.defined(), name, "shift",
               "to be absent for " + std::string(parts.qtype.name), "one");
  }
  cover_new_operators();
  const WeightScheme scheme{parts.qtype, parts.group_size, default_quantizer(parts.qtype)};
  return make_weight(std::make_shared<WeightCell>(scheme, std::move(codes)), dtype);
}

std::int64_t fallback_count() {
  std::int64_t total = 0;
  for (const auto& [op, count] : logged_fallbacks()) total += count;
  return total;
}

std::map<std::string, std::int64_t> fallback_counts() { return logged_fallbacks(); }

void reset_fallback_counts() { clear_logged_fallbacks(); }

std::int64_t refresh_operators() { return cover_operators(); }

}  // namespace quantal
