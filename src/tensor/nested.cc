#include "tensor/nested.h"

#include <ATen/ATen.h>

#include "tensor/autograd.h"

namespace quantal {

at::Tensor over_tokens(const at::Tensor& nested,
                       const std::function<at::Tensor(const at::Tensor&)>& run) {
  const at::Tensor sizes = nested._nested_tensor_size();  // (batch, 2): tokens, features
  TORCH_CHECK_VALUE(sizes.dim() == 2 && sizes.size(1) == 2,
                    "[quantal] expected a nested tensor of matrices, (batch, tokens, features)");
  const at::Tensor tokens = sizes.select(1, 0), features = sizes.select(1, 1);
  const auto in = features[0].item<std::int64_t>();
  TORCH_CHECK_VALUE(
      features.eq(in).all().item<bool>(),
      "[quantal] expected a nested tensor with as many features in every matrix, got ", features);
  const at::Tensor rows = nested.contiguous().values().view({-1, in});
  const at::Tensor result = dequantize_ste(run(rows));
  const std::int64_t out = result.size(1);
  const at::Tensor lengths = tokens * out;
  return at::_nested_view_from_buffer(
      result.reshape(-1), at::stack({tokens, at::full_like(tokens, out)}, 1),
      at::stack({at::full_like(tokens, out), at::ones_like(tokens)}, 1),
      lengths.cumsum(0) - lengths);
}

}  // namespace quantal
