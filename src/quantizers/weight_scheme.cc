#include "quantizers/weight_scheme.h"

#include <ATen/ATen.h>

namespace quantal {
namespace {

// Rounds scale and shift to the weight's dtype, as a checkpoint stores them. fp16 scales of tiny
// weights become zero or subnormal and coarse shifts move the whole group: these stay in fp32.
ScaleShift round_to(const ScaleShift& exact, at::ScalarType dtype) {
  if (dtype != at::kHalf && dtype != at::kBFloat16) return exact;
  if (exact.scale.numel() == 0) {
    return {exact.scale.to(dtype), exact.shift.defined() ? exact.shift.to(dtype) : exact.shift};
  }
  const double smallest_normal = dtype == at::kHalf ? 6.103515625e-05 : 1.1754943508222875e-38;
  ScaleShift rounded{exact.scale.to(dtype), {}};
  const at::Tensor scale = rounded.scale.to(exact.scale.scalar_type());
  at::Tensor safe = (scale >= smallest_normal).logical_and_(scale.isfinite());
  if (exact.shift.defined()) {
    rounded.shift = exact.shift.to(dtype);
    const at::Tensor shift = rounded.shift.to(exact.shift.scalar_type());
    safe.logical_and_((shift - exact.shift).abs() <= scale * 0.25);
  }
  return safe.all().item<bool>() ? rounded : exact;
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
  const at::Tensor groups = to_groups(weight, scheme.group_size);
  const ScaleShift exact = (*scheme.quantizer)(groups, scheme.qtype);
  const ScaleShift stored = round_to(exact, weight.scalar_type());
  return encode_weight(weight, scheme.qtype, scheme.group_size, stored.scale, stored.shift);
}

void check_finite(const at::Tensor& weight, std::string_view name) {
  const at::Tensor finite = at::isfinite(weight);
  if (weight.numel() == 0 || finite.all().item<bool>()) return;
  const at::Tensor index = finite.logical_not().nonzero()[0];
  std::vector<std::int64_t> position;
  for (std::int64_t i = 0; i < index.numel(); ++i) position.push_back(index[i].item<std::int64_t>());
  TORCH_CHECK_VALUE(false, "[quantal::quantize] expected finite values, got ",
                    at::isnan(weight.index_select(0, index.narrow(0, 0, 1))).any().item<bool>()
                        ? "NaN or Inf"
                        : "Inf",
                    " in '", name, "' at index ", c10::IntArrayRef(position));
}

}  // namespace quantal
