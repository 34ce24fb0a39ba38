#pragma once

#include <ATen/core/Tensor.h>

#include "tensor/qtensor_impl.h"

namespace quantal {

/// True for an activation that holds codes (not one that a write or calibration made float).
bool has_codes(const at::Tensor& t);
bool has_int8_codes(const at::Tensor& t);

/// A new activation over `codes`: dense, of its own storage, in the code dtype of `qtype`.
at::Tensor activation_from_codes(const at::Tensor& codes, const QType& qtype,
                                 const at::Tensor& scale, at::ScalarType dtype);

/// `codes = clamp(round(x / scale))`; straight-through gradient. Where x has a NaN, which no
/// integer code can hold, the activation stays float. Precondition: 8-bit qtype, fp32 scalar scale.
at::Tensor quantize_activation_ste(const at::Tensor& x, const QType& qtype,
                                   const at::Tensor& scale);

/// x rounded to what dynamic quantization with one scale a token would make of it, in x's dtype;
/// straight-through gradient.
at::Tensor fake_quantize_tokens(const at::Tensor& x, const QType& qtype, TokenAxis axis);

/// Whether prepare_input() would quantize x with one scale a token.
bool quantizes_dynamically(const std::shared_ptr<LayerState>& layer, const at::Tensor& x);

/// The scale with which finish_output() would quantize to int8; undefined where it would not.
at::Tensor int8_output_scale(const std::shared_ptr<LayerState>& layer, bool bias_follows = false);

/// Ends a layer whose bias was added in place: observes or quantizes the value, as finish_output
/// would have.
void finish_pending(const at::Tensor& activation);

}  // namespace quantal
