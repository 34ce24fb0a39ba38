#pragma once

#include <optional>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include "tensor/fallback.h"

/// Operations that run on an activation's codes, or on the value of one that calibration watches.
/// Each takes an operation's arguments and returns its results, or nothing where the codes cannot
/// hold them: then the fallback runs.
namespace quantal {

using Results = std::optional<std::vector<at::Tensor>>;
using Arguments = c10::ArrayRef<c10::IValue>;

Results relu_codes(Arguments arguments);
Results relu_codes_(Arguments arguments);
Results neg_codes(Arguments arguments);
Results mul_codes(Arguments arguments);
Results div_codes(Arguments arguments);
Results cat_codes(Arguments arguments);
Results stack_codes(Arguments arguments);
Results softmax_codes(Arguments arguments);
Results max_pool2d_indices(Arguments arguments);
Results max_pool3d_indices(Arguments arguments);
/// add_ of a bias that a layer still waits for.
Results add_bias_(Arguments arguments);

/// The boxed kernel that tries `run` and falls back.
template <Results (*run)(Arguments)>
void codes_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const size_t count = op.schema().arguments().size();
  Results results = run(torch::jit::last(*stack, count));
  if (!results) return fallback_kernel(op, stack);
  torch::jit::drop(*stack, count);
  for (at::Tensor& result : *results) stack->emplace_back(std::move(result));
}

/// max_pool1d, 2d or 3d, which are composite: codes alone where no gradient wants the places of the
/// largest ones; otherwise through the operation with indices.
template <int dims>
at::Tensor max_pool(const at::Tensor& x, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                    at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode);

}  // namespace quantal
