#pragma once

#include <optional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

/// Weights whose parts belong to a module of Python, as tensors that torch's own functions take: a
/// call of torch.nn.functional.linear with one takes half the time of torch.ops.quantal.linear,
/// which has ten arguments to read.
namespace quantal {

using WeakTensor = c10::weak_intrusive_ptr<at::TensorImpl, at::UndefinedTensorImpl>;

/// What torch.ops.quantal.linear and convolution are told of a weight and its activations
/// (ops/plain_ops.h), by their names.
struct BoundWeight {
  /// Does not keep the codes in memory.
  WeakTensor weak_data;
  at::Tensor scale;
  std::optional<at::Tensor> shift;
  std::string qtype;
  std::int64_t group_size = 0;
  std::vector<std::int64_t> sizes;
  std::string activations;
  std::optional<at::Tensor> input_scale;

  /// Raises where nobody has the codes any more.
  at::Tensor data() const;
};

/// For aten::linear and aten::convolution (not transposed) this stands for the operators'
/// arguments: those very tensors, as they are when it is called. The operators check them. All
/// other functions raise.
at::Tensor bind_weight(BoundWeight arguments, at::ScalarType dtype);

/// Of a weight that bind_weight() made, and of none of its aliases; else null.
const BoundWeight* bound_weight(const at::Tensor& weight);

}  // namespace quantal
