#include "quantizers/weight_scheme.h"

#include <ATen/ATen.h>

#include <cmath>
#include <limits>
#include <optional>

#include "ops/cpu_kernels.h"
#include "ops/cpu_weights.h"

namespace quantal {
namespace {

// Rounds scale and shift to the weight's dtype, as a checkpoint stores them. fp16 scales of tiny
// weights become zero or subnormal, coarse shifts move the whole group, and the largest value may
// round to infinity: these stay as they are.
ScaleShift round_to(const ScaleShift& exact, const QType& qtype, at::ScalarType dtype) {
  ScaleShift rounded{exact.scale.to(dtype), {}};
  if (exact.shift.defined()) rounded.shift = exact.shift.to(dtype);
  if ((dtype != at::kHalf && dtype != at::kBFloat16) || exact.scale.numel() == 0) return rounded;
  const double levels = qtype.is_affine() ? (1 << qtype.bits) - 1 : qtype.qmax;
  const double smallest_normal = dtype == at::kHalf ? 6.103515625e-05 : 1.1754943508222875e-38;
  const at::Tensor scale = rounded.scale.to(exact.scale.scalar_type());
  at::Tensor safe = (scale >= smallest_normal).logical_and_(scale.isfinite());
  if (exact.shift.defined()) {
    const at::Tensor shift = rounded.shift.to(exact.shift.scalar_type());
    safe.logical_and_((shift - exact.shift).abs() <= scale * 0.25);
    safe.logical_and_((scale * levels - shift).to(dtype).isfinite());
  } else {
    safe.logical_and_((scale * levels).to(dtype).isfinite());
  }
  return safe.all().item<bool>() ? rounded : exact;
}

// Affine codes depend on differences of small numbers: the same whether or not the processor
// flushes subnormals only where there are none.
at::Tensor without_subnormals(const at::Tensor& groups) {
  const double largest = groups.scalar_type() == at::kDouble
                             ? std::nextafter(std::numeric_limits<double>::min(), 0.0)
                             : std::nextafter(std::numeric_limits<float>::min(), 0.0F);
  return at::hardshrink(groups, largest);
}

// The kernels' codes; nothing where they do not take the weight, as where it is not finite.
std::optional<WeightCodes> by_kernel(const at::Tensor& weight, const WeightScheme& scheme) {
  if (!is_by_extremes(*scheme.quantizer)) return std::nullopt;
  return quantize_on_cpu(weight, scheme.qtype, scheme.group_size);
}

WeightCodes by_aten(const at::Tensor& weight, const WeightScheme& scheme) {
  at::Tensor groups = to_groups(weight, scheme.group_size);
  // fp16 has no numbers that small, but a -0, whose order beside 0 ATen leaves open.
  if (scheme.qtype.is_affine()) groups = without_subnormals(groups);
  const ScaleShift exact = (*scheme.quantizer)(groups, scheme.qtype);
  const ScaleShift stored = round_to(exact, scheme.qtype, weight.scalar_type());
  return encode_groups(groups, weight.sizes(), scheme.qtype, scheme.group_size, stored.scale,
                       stored.shift);
}

}  // namespace

std::int64_t default_group_size(const QType& qtype, std::int64_t row_length) {
  if (!qtype.is_affine() || row_length <= 128) return 0;
  for (std::int64_t group : {128, 96, 64, 32}) {
    if (row_length % group == 0) return group;
  }
  return 0;
}

WeightCodes quantize(const at::Tensor& weight, const WeightScheme& scheme) {
  auto codes = by_kernel(weight, scheme);
  return codes ? *std::move(codes) : by_aten(weight, scheme);
}

WeightCodes quantize_finite(const at::Tensor& weight, const WeightScheme& scheme,
                            std::string_view name) {
  if (auto codes = by_kernel(weight, scheme)) return *std::move(codes);
  check_finite(weight, name);
  return by_aten(weight, scheme);
}

WeightCodes round_scales(const WeightCodes& codes, at::ScalarType dtype) {
  WeightCodes rounded = codes;
  ScaleShift stored = round_to({codes.scale, codes.shift}, codes.qtype, dtype);
  rounded.scale = std::move(stored.scale);
  rounded.shift = std::move(stored.shift);
  return rounded;
}

void check_finite(const at::Tensor& weight, std::string_view name) {
  if (is_cpu_activation(weight) && find_non_finite_on_cpu(weight) < 0) return;
  const at::Tensor finite = at::isfinite(weight);
  if (finite.all().item<bool>()) return;
  const at::Tensor index = finite.logical_not().nonzero()[0].cpu().contiguous();
  const auto* position = index.const_data_ptr<std::int64_t>();
  TORCH_CHECK_VALUE(false, "[quantal::quantize] expected finite values in '", name,
                    "', got NaN or Inf at index ",
                    at::IntArrayRef(position, static_cast<size_t>(index.numel())));
}

}  // namespace quantal
