#include "tensor/bound_weight.h"

#include <utility>

#include "ops/canonical_weight.h"
#include "ops/plain_arguments.h"
#include "tensor/qtensor_impl.h"

namespace quantal {

at::Tensor bind_weight(BoundArguments arguments, at::ScalarType dtype) {
  const QType qtype = qtype_of(arguments.qtype);
  activation_qtype(arguments.activations);  // or it raises
  auto codes = std::make_shared<const WeightCodes>(
      canonical_codes("bind_weight", arguments.data, arguments.scale, arguments.shift, qtype,
                      arguments.group_size, arguments.sizes));
  const WeightScheme scheme{qtype, arguments.group_size, nullptr};
  // Also where it is first called under InferenceMode, which it outlives.
  const c10::InferenceMode normal(false);
  at::Tensor weight = make_weight(std::make_shared<WeightCell>(scheme, std::move(codes)), dtype);
  impl_of(weight)->bound = std::make_shared<const BoundArguments>(std::move(arguments));
  return weight;
}

const BoundArguments* bound_arguments(const at::Tensor& weight) {
  return is_weight(weight) ? impl_of(weight)->bound.get() : nullptr;
}

}  // namespace quantal
