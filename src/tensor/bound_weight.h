#pragma once

#include <optional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

/// Weights whose parts belong to a module of Python, as tensors that torch's own functions take: a
/// call of torch.nn.functional.linear with one takes half the time of torch.ops.quantal.linear,
/// which has ten arguments to read.
namespace quantal {

/// What torch.ops.quantal.linear and convolution are told of a weight and its activations
/// (ops/plain_ops.h), by their names.
struct BoundArguments {
  at::Tensor data;
  at::Tensor scale;
  std::optional<at::Tensor> shift;
  std::string qtype;
  std::int64_t group_size = 0;
  std::vector<std::int64_t> sizes;
  std::string activations;
  std::optional<at::Tensor> input_scale;
};

/// The same, without keeping the codes in memory.
class BoundWeight {
 public:
  explicit BoundWeight(BoundArguments arguments);
  /// Raises where nobody has the codes any more.
  BoundArguments arguments() const;

 private:
  BoundArguments rest_;
  c10::weak_intrusive_ptr<at::TensorImpl, at::UndefinedTensorImpl> data_;
};

/// For aten::linear and aten::convolution (not transposed) this stands for the operators'
/// arguments: those very tensors, as they are when it is called. The operators check them. All
/// other functions raise.
at::Tensor bind_weight(BoundArguments arguments, at::ScalarType dtype);

/// Of a weight that bind_weight() made, and of none of its aliases; else null.
const BoundWeight* bound_weight(const at::Tensor& weight);

}  // namespace quantal
