#pragma once

#include <ATen/core/Tensor.h>

#include <quantal/qtype.h>

/// Activations rounded to what quantizing them would make of them, as plain floats.
namespace quantal {

/// What shares a scale that is found at run time.
enum class TokenAxis : std::uint8_t {
  kLastDim,   ///< linear: one scale a token, over the last dimension
  kFirstDim,  ///< convolution: one scale a sample, over every dimension but the first
};

/// Scales below this would make x / scale overflow.
constexpr double kSmallestScale = 1.1754943508222875e-38;

/// scale · clamp(round(x / scale)) with scale = absmax / qmax of each token, in x's dtype. A token
/// with a NaN or infinity becomes NaN. Precondition: 8-bit qtype.
at::Tensor fake_quantize_dynamic(const at::Tensor& x, const QType& qtype, TokenAxis axis);

/// The same with one given scale. NaN stays NaN.
at::Tensor fake_quantize_static(const at::Tensor& x, const QType& qtype, const at::Tensor& scale);

}  // namespace quantal
