#pragma once

#include <optional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

/// Weights whose parts belong to a module of Python, as tensors that torch's own functions take:
/// a call of torch.nn.functional.linear with one costs a third of what torch.ops.quantal.linear
/// takes to read its arguments.
namespace quantal {

/// What torch.ops.quantal.linear and convolution are told of a weight and its activations
/// (ops/plain_ops.h), by their names.
struct BoundArguments {
  at::Tensor data, scale;
  std::optional<at::Tensor> shift;
  std::string qtype;
  std::int64_t group_size = 0;
  std::vector<std::int64_t> sizes;
  std::string activations;
  std::optional<at::Tensor> input_scale;
};

/// A weight over those very tensors: what is written to them, or set as their data, it shows. For
/// aten::linear and aten::convolution it stands for the operators' arguments; everything else sees
/// a frozen weight of `dtype`. ValueError where the parts are not those of a weight.
at::Tensor bind_weight(BoundArguments arguments, at::ScalarType dtype);

/// Of a weight that bind_weight() made, and of none of its aliases; else null.
const BoundArguments* bound_arguments(const at::Tensor& weight);

}  // namespace quantal
