#pragma once

#include <functional>

#include <ATen/core/Tensor.h>

namespace quantal {

/// `run` over all rows of a nested tensor of sequences, (batch, tokens, features), as one matrix
/// (all tokens, features). Its result, one row a token, comes back as nested sequences. Raises
/// where the features differ. Differentiable.
at::Tensor over_tokens(const at::Tensor& nested,
                       const std::function<at::Tensor(const at::Tensor&)>& run);

}  // namespace quantal
