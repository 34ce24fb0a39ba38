#pragma once

#include "tensor/support.h"

namespace quantal::test {

/// got = run(x, w, bias), a convolution, in x's dtype, up to the rounding of fp32 sums (fp64 for
/// double), of w's dtype and of the result, and of a bias that is added afterwards. Affine weights
/// may be computed as scale · Σ code·x − shift · Σ x, whose terms are at most twice the largest
/// weight.
template <typename Run>
::testing::AssertionResult is_convolution(const at::Tensor& got, const Run& run,
                                          const at::Tensor& x, const at::Tensor& w,
                                          const at::Tensor& bias = {}) {
  if (got.scalar_type() != x.scalar_type()) {
    return ::testing::AssertionFailure() << got.scalar_type() << ", not " << x.scalar_type();
  }
  const at::Tensor values = value_of(x).detach().to(at::kDouble);
  const at::Tensor weight = value_of(w.detach().to(at::kDouble)).detach().to(at::kDouble);
  const at::Tensor added = bias.defined() ? value_of(bias).detach().to(at::kDouble) : bias;
  const at::Tensor exact = run(values, weight, added);
  const at::Tensor largest = weight.abs() + 2 * weight.abs().max();
  const at::Tensor size = run(values.abs(), largest, added.defined() ? added.abs() : added);
  const std::int64_t terms = weight.numel() / weight.size(0) + 8;
  const double rounding =
      unit_roundoff(w.scalar_type()) + (added.defined() ? unit_roundoff(x.scalar_type()) : 0);
  return is_within(value_of(got), exact,
                   sum_bound(exact, size, terms, x.scalar_type()) + size * rounding);
}

}  // namespace quantal::test
