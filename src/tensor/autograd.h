#pragma once

#include <functional>

#include <ATen/core/Tensor.h>

namespace quantal {

/// Whether a Function would be right to record a graph: not inside kernels that run below autograd,
/// where it would do so all the same.
bool records_gradients();

/// `forward(x)` with the identity as its gradient: how every quantizing and dequantizing step is
/// differentiated (straight-through estimator; Bengio et al., 2013). `forward` runs below autograd
/// and returns a tensor of x's shape that is new.
at::Tensor straight_through(const at::Tensor& x,
                            const std::function<at::Tensor(const at::Tensor&)>& forward);

/// What compute operations read of `t` (quantized_value), differentiable; plain tensors as they
/// are.
at::Tensor dequantize_ste(const at::Tensor& t);

/// What every other operation reads of `t` (float_value), differentiable.
at::Tensor float_value_ste(const at::Tensor& t);

/// y = x·wᵀ (+ bias) over the quantized values of x and w, in x's dtype: x (…, in), w (out, in),
/// bias (out) or undefined. Keeps codes, not floats, for the backward pass. `is_dynamic`: x is
/// quantized to int8 first, as fake_quantize_tokens() does. `output_scale`, or undefined: where no
/// graph is recorded and kernels multiply codes, y may be a quantized activation of that scale.
at::Tensor linear_ste(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                      bool is_dynamic = false, const at::Tensor& output_scale = {});

/// Rows `indices` of the quantized value of `weight` (rows, columns).
at::Tensor embedding_ste(const at::Tensor& weight, const at::Tensor& indices,
                         std::int64_t padding_idx, bool scale_grad_by_freq, bool sparse);

}  // namespace quantal
