#include "tensor/activation_ops.h"

#include <ATen/ATen.h>

#include "ops/pool.h"
#include "tensor/activation.h"
#include "tensor/autograd.h"
#include "tensor/qtensor_impl.h"

namespace quantal {
namespace {

const ActivationCell& cell_of(const at::Tensor& t) { return *impl_of(t)->activation; }

// Float, but calibration still wants to know who takes it in the end.
bool is_traced(const at::Tensor& t) { return is_activation(t) && cell_of(t).traced != nullptr; }

// Codes as bytes: float8 has no arithmetic, and its sign is the sign of the byte.
at::Tensor code_bytes(const at::Tensor& t) { return activation_codes(t).view(at::kChar); }

std::vector<at::Tensor> with_codes(const at::Tensor& like, const at::Tensor& bytes,
                                   const at::Tensor& scale) {
  const QType& qtype = cell_of(like).qtype;
  return {activation_from_codes(bytes.view(code_dtype(qtype)), qtype, scale, like.scalar_type())};
}

at::Tensor negated(const at::Tensor& bytes, const QType& qtype) {
  if (!qtype.is_floating_point) return bytes.neg();
  // The bits of minus zero are NaN in e4m3fnuz: zero keeps its sign.
  return at::where(bytes == 0, bytes, bytes.bitwise_xor(at::Scalar(-128)));
}

bool have_equal_scales(const std::vector<at::Tensor>& tensors) {
  if (tensors.empty() || !has_codes(tensors[0])) return false;
  const ActivationCell& first = cell_of(tensors[0]);
  for (const at::Tensor& t : tensors) {
    if (!has_codes(t) || cell_of(t).qtype != first.qtype ||
        t.scalar_type() != tensors[0].scalar_type() || !at::equal(cell_of(t).scale, first.scale)) {
      return false;
    }
  }
  return true;
}

std::vector<at::Tensor> all_code_bytes(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> bytes;
  bytes.reserve(tensors.size());
  for (const at::Tensor& t : tensors) bytes.push_back(code_bytes(t));
  return bytes;
}

// The activation times `factor`: the scale takes its size, the codes its sign.
Results scaled(const at::Tensor& x, double factor, bool divide) {
  if (factor == 0 || !std::isfinite(factor)) return std::nullopt;
  const at::Tensor scale =
      divide ? cell_of(x).scale / std::abs(factor) : cell_of(x).scale * std::abs(factor);
  const double size = scale.item<double>();
  if (!std::isfinite(size) || size < std::numeric_limits<float>::min()) return std::nullopt;
  const at::Tensor bytes = code_bytes(x).clone();
  return with_codes(x, factor < 0 ? negated(bytes, cell_of(x).qtype) : bytes, scale);
}

// A real number that does not change the dtype of what it multiplies.
std::optional<double> scalar_factor(const at::Tensor& x, const c10::IValue& factor) {
  if (factor.isScalar()) {
    return factor.isComplexDouble() ? std::nullopt : std::optional(factor.toScalar().toDouble());
  }
  const at::Tensor& other = factor.toTensor();
  if (is_qtensor(other) || other.dim() != 0 || !other.device().is_cpu() || x.dim() == 0 ||
      other.is_complex()) {
    return std::nullopt;
  }
  return other.item<double>();
}

Results scale_by(Arguments arguments, bool divide) {
  const at::Tensor& x = arguments[0].toTensor();
  if (!has_codes(x)) return std::nullopt;
  const auto factor = scalar_factor(x, arguments[1]);
  return factor ? scaled(x, *factor, divide) : std::nullopt;
}

// Pools codes by the positions of the largest values: scales are positive, so order is kept.
template <typename Pool>
Results pooled(Arguments arguments, int spatial_dims, const Pool& pool) {
  const at::Tensor& x = arguments[0].toTensor();
  if (!has_codes(x) && !is_traced(x)) return std::nullopt;
  auto [value, indices] = pool(quantized_value(x));
  if (!has_codes(x)) {
    return {{make_float_activation(value, cell_of(x).traced, nullptr), indices}};
  }
  const at::Tensor bytes =
      code_bytes(x).flatten(-spatial_dims).gather(-1, indices.flatten(-spatial_dims));
  auto results = with_codes(
      x, bytes.view(indices.sizes()).contiguous(indices.suggest_memory_format()), cell_of(x).scale);
  results.push_back(indices);
  return results;
}

std::vector<std::int64_t> ints(const c10::IValue& value) { return value.toIntVector(); }

}  // namespace

Results relu_codes(Arguments arguments) {
  const at::Tensor& x = arguments[0].toTensor();
  if (has_codes(x)) return with_codes(x, code_bytes(x).clamp_min(0), cell_of(x).scale);
  if (!is_traced(x)) return std::nullopt;
  return {{make_float_activation(at::relu(quantized_value(x)), cell_of(x).traced, nullptr)}};
}

Results relu_codes_(Arguments arguments) {
  const at::Tensor& x = arguments[0].toTensor();
  if (!has_codes(x)) return std::nullopt;
  code_bytes(x).clamp_min_(0);
  return {{x}};
}

Results neg_codes(Arguments arguments) {
  const at::Tensor& x = arguments[0].toTensor();
  if (!has_codes(x)) return std::nullopt;
  return with_codes(x, negated(code_bytes(x), cell_of(x).qtype), cell_of(x).scale);
}

Results mul_codes(Arguments arguments) { return scale_by(arguments, /*divide=*/false); }

Results div_codes(Arguments arguments) { return scale_by(arguments, /*divide=*/true); }

Results cat_codes(Arguments arguments) {
  const auto tensors = arguments[0].toTensorVector();
  if (!have_equal_scales(tensors)) return std::nullopt;
  return with_codes(tensors[0], at::cat(all_code_bytes(tensors), arguments[1].toInt()),
                    cell_of(tensors[0]).scale);
}

Results stack_codes(Arguments arguments) {
  const auto tensors = arguments[0].toTensorVector();
  if (!have_equal_scales(tensors)) return std::nullopt;
  return with_codes(tensors[0], at::stack(all_code_bytes(tensors), arguments[1].toInt()),
                    cell_of(tensors[0]).scale);
}

// Probabilities lie in [0, 1]: their scale is known, as in optimum-quanto.
Results softmax_codes(Arguments arguments) {
  const at::Tensor& x = arguments[0].toTensor();
  if (!has_codes(x)) return std::nullopt;
  const QType& qtype = cell_of(x).qtype;
  const at::Tensor value =
      at::_softmax(quantized_value(x), arguments[1].toInt(), arguments[2].toBool());
  return {
      {quantize_activation_ste(value, qtype, at::full_like(cell_of(x).scale, 1.0 / qtype.qmax))}};
}

Results max_pool2d_indices(Arguments a) {
  return pooled(a, 2, [&](const at::Tensor& x) {
    return at::max_pool2d_with_indices(x, ints(a[1]), ints(a[2]), ints(a[3]), ints(a[4]),
                                       a[5].toBool());
  });
}

Results max_pool3d_indices(Arguments a) {
  return pooled(a, 3, [&](const at::Tensor& x) {
    return at::max_pool3d_with_indices(x, ints(a[1]), ints(a[2]), ints(a[3]), ints(a[4]),
                                       a[5].toBool());
  });
}

Results add_bias_(Arguments arguments) {
  const at::Tensor& x = arguments[0].toTensor();
  const at::Tensor& bias = arguments[1].toTensor();
  if (!is_activation(x) || !cell_of(x).pending || is_qtensor(bias) || bias.dim() > x.dim()) {
    return std::nullopt;
  }
  Geometry::of(x).view_of(cell_of(x).value).add_(bias, arguments[2].toScalar());
  finish_pending(x);
  return {{x}};
}

template <int dims>
at::Tensor max_pool(const at::Tensor& x, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                    at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  const auto with_indices = [&](const at::Tensor& value) {
    if constexpr (dims == 1) {
      return at::max_pool1d_with_indices(value, kernel_size, stride, padding, dilation, ceil_mode);
    } else if constexpr (dims == 2) {
      return at::max_pool2d_with_indices(value, kernel_size, stride, padding, dilation, ceil_mode);
    } else {
      return at::max_pool3d_with_indices(value, kernel_size, stride, padding, dilation, ceil_mode);
    }
  };
  if (!has_codes(x) || cell_of(x).qtype != qint8 || (records_gradients() && x.requires_grad())) {
    return std::get<0>(with_indices(x));
  }
  at::AutoDispatchBelowADInplaceOrView below;
  const at::Tensor codes = activation_codes(x);
  if (!codes.is_cpu()) return std::get<0>(with_indices(x));
  // On no device: the output's sizes, and torch's errors.
  const at::Tensor like =
      std::get<0>(with_indices(at::empty_like(codes, codes.options().device(at::kMeta))));
  const auto pooled = max_pool_codes(codes, like, {dims, kernel_size, stride, padding, dilation});
  if (!pooled) return std::get<0>(with_indices(x));
  return activation_from_codes(*pooled, qint8, cell_of(x).scale, x.scalar_type());
}

template at::Tensor max_pool<1>(const at::Tensor&, at::IntArrayRef, at::IntArrayRef,
                                at::IntArrayRef, at::IntArrayRef, bool);
template at::Tensor max_pool<2>(const at::Tensor&, at::IntArrayRef, at::IntArrayRef,
                                at::IntArrayRef, at::IntArrayRef, bool);
template at::Tensor max_pool<3>(const at::Tensor&, at::IntArrayRef, at::IntArrayRef,
                                at::IntArrayRef, at::IntArrayRef, bool);

}  // namespace quantal
