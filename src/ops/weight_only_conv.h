#pragma once

#include <optional>

#include <ATen/core/Tensor.h>

#include "ops/packed_conv.h"
#include "ops/weight_codes.h"

namespace quantal {

/// at::convolution() of x and a float weight.
at::Tensor aten_convolution(const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, const ConvParams& params);

/// The same with the value of `weight`, in x's dtype and memory format. On the CPU by a kernel that
/// reads the codes, or, for few positions, as a linear of patches. Elsewhere and where torch's
/// convolution takes less time, the weight is dequantized, on the CPU some rows after the other
/// into 4 MiB that a thread keeps from call to call: fresh memory of a whole weight takes as long
/// as the convolution, since the system hands out its pages anew each time.
at::Tensor weight_only_convolution(const at::Tensor& x, const WeightCodes& weight,
                                   const std::optional<at::Tensor>& bias, const ConvParams& params);

}  // namespace quantal
