#include "ops/fake_quantize.h"

#include <ATen/ATen.h>

#include "ops/weight_codes.h"

namespace quantal {
namespace {

at::Tensor token_absmax(const at::Tensor& x, TokenAxis axis) {
  if (axis == TokenAxis::kLastDim || x.dim() < 2) return x.abs().amax(-1, /*keepdim=*/true);
  std::vector<std::int64_t> rest;
  for (std::int64_t i = 1; i < x.dim(); ++i) rest.push_back(i);
  return x.abs().amax(rest, /*keepdim=*/true);
}

// x / scale rounded to codes, as floats.
at::Tensor rounded(const at::Tensor& value, const QType& qtype) {
  if (!qtype.is_floating_point) return value.round().clamp_(qtype.qmin, qtype.qmax);
  return value.clamp(qtype.qmin, qtype.qmax).to(code_dtype(qtype)).to(value.scalar_type());
}

}  // namespace

at::Tensor fake_quantize_dynamic(const at::Tensor& x, const QType& qtype, TokenAxis axis) {
  if (x.numel() == 0) return x.clone();
  const at::Tensor value = x.to(arithmetic_dtype(x.scalar_type()));
  const at::Tensor scale = (token_absmax(value, axis) / qtype.qmax).clamp_min_(kSmallestScale);
  return rounded(value / scale, qtype).mul_(scale).to(x.scalar_type());
}

at::Tensor fake_quantize_static(const at::Tensor& x, const QType& qtype, const at::Tensor& scale) {
  const at::Tensor value = x.to(arithmetic_dtype(x.scalar_type()));
  const at::Tensor divisor = scale.to(value.options());
  return rounded(value / divisor, qtype).mul_(divisor).to(x.scalar_type());
}

}  // namespace quantal
