#pragma once

#include <optional>
#include <string>

#include <ATen/core/Tensor.h>

#include <quantal/qtensor.h>

#include "quantizers/weight_scheme.h"

namespace quantal {

/// The scheme that `options` mean for `weight`; ValueError naming `name` where they do not fit it.
WeightScheme resolve_scheme(const at::Tensor& weight, const WeightOptions& options,
                            const std::string& name);

/// A live weight over `weight`'s own storage; without a scheme one that only carries a layer.
at::Tensor make_live_weight(const at::Tensor& weight, std::optional<WeightScheme> scheme);

}  // namespace quantal
