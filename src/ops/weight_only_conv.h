#pragma once

#include <functional>
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

/// Rows [begin, begin + count) of the float value of a weight, in its dtype.
using DecodeRows = std::function<at::Tensor(std::int64_t begin, std::int64_t count)>;
DecodeRows decoding(const WeightCodes& weight, at::ScalarType dtype);

/// Such a convolution by torch's own, of a weight of `sizes` that is decoded some rows after the
/// other, at most 4 MiB of it as floats at once.
at::Tensor convolution_of_rows(const at::Tensor& x, at::IntArrayRef sizes, const DecodeRows& decode,
                               const std::optional<at::Tensor>& bias, const ConvParams& params);

/// The gradient of the input of such a convolution, in differentiable operations, some rows of the
/// weight after the other, too.
at::Tensor convolution_input_grad(const at::Tensor& grad, const at::Tensor& x,
                                  at::IntArrayRef sizes, const DecodeRows& decode,
                                  const ConvParams& params);
/// That of its bias.
at::Tensor convolution_bias_grad(const at::Tensor& grad);

}  // namespace quantal
