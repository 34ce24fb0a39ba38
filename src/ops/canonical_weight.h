#pragma once

#include <optional>

#include <ATen/core/Tensor.h>

#include "kernels/canonical_linear.h"
#include "ops/weight_codes.h"

namespace quantal {

/// A weight of shape `sizes` from its parts in canonical form. ValueError naming `op` and what does
/// not fit.
WeightCodes canonical_codes(const char* op, const at::Tensor& data, const at::Tensor& scale,
                            const std::optional<at::Tensor>& shift, const QType& qtype,
                            std::int64_t group_size, at::IntArrayRef sizes);

/// A weight matrix (out, in) that stays in canonical form while it computes.
class CanonicalMatrix {
 public:
  /// For an input of shape (…, in).
  CanonicalMatrix(const char* op, const at::Tensor& data, const at::Tensor& scale,
                  const std::optional<at::Tensor>& shift, const QType& qtype,
                  std::int64_t group_size, const at::Tensor& x);
  CanonicalMatrix(const char* op, const at::Tensor& data, const at::Tensor& scale,
                  const std::optional<at::Tensor>& shift, const QType& qtype,
                  std::int64_t group_size, std::int64_t columns);
  /// The rows of a weight of any dimensions.
  explicit CanonicalMatrix(const WeightCodes& codes);

  /// x · wᵀ + bias in x's dtype, x quantized to `activations` (with `scale`; one scale a token
  /// where it is undefined).
  at::Tensor linear(const at::Tensor& x, const at::Tensor& bias,
                    const std::optional<QType>& activations, const at::Tensor& scale) const;

  /// grad (…, out) · w, a block of rows of w after the other.
  at::Tensor times(const at::Tensor& grad) const;

 private:
  bool runs_kernels(const at::Tensor& x) const;
  at::Tensor run_float(const at::Tensor& x, const at::Tensor& bias) const;
  at::Tensor run_integer(const at::Tensor& x, const at::Tensor& bias,
                         const at::Tensor& scale) const;

  WeightCodes codes_;
};

}  // namespace quantal
