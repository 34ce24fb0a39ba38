#include "tensor/bound_weight.h"

#include <utility>

#include "tensor/qtensor_impl.h"

namespace quantal {

at::Tensor BoundWeight::data() const {
  auto impl = weak_data.lock();
  TORCH_CHECK(impl.defined(), "[quantal] the codes of a bound weight are gone");
  return at::Tensor(std::move(impl));
}

at::Tensor bind_weight(BoundWeight arguments, at::ScalarType dtype) {
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
