#include "tensor/bound_weight.h"

#include <utility>

#include "tensor/qtensor_impl.h"

namespace quantal {

BoundWeight::BoundWeight(BoundArguments arguments)
    : rest_(std::move(arguments)), data_(rest_.data.getIntrusivePtr()) {
  rest_.data = at::Tensor();
}

BoundArguments BoundWeight::arguments() const {
  BoundArguments arguments = rest_;
  auto data = data_.lock();
  TORCH_CHECK(data.defined(), "[quantal] the codes of a bound weight are gone");
  arguments.data = at::Tensor(std::move(data));
  return arguments;
}

at::Tensor bind_weight(BoundArguments arguments, at::ScalarType dtype) {
  // Also where it is first called under InferenceMode, which it outlives.
  const c10::InferenceMode normal(false);
  at::Tensor weight = make_weight(WeightCell::without_value(arguments.sizes, dtype), dtype);
  impl_of(weight)->bound = std::make_shared<const BoundWeight>(std::move(arguments));
  return weight;
}

const BoundWeight* bound_weight(const at::Tensor& weight) {
  return is_weight(weight) ? impl_of(weight)->bound.get() : nullptr;
}

}  // namespace quantal
