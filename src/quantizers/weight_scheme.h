#pragma once

#include <memory>

#include <ATen/core/Tensor.h>

#include <quantal/quantizer.h>

#include "ops/weight_codes.h"

namespace quantal {

/// How a weight is quantized: its qtype, its group size and who chooses scale and shift.
struct WeightScheme {
  QType qtype = qint8;
  std::int64_t group_size = 0;  ///< 0: one group a row
  std::shared_ptr<const Quantizer> quantizer;
};

/// optimum-quanto's rule: 0 for 8-bit types and rows of at most 128 elements, else the first of
/// 128, 96, 64 and 32 that divides the row, else 0.
std::int64_t default_group_size(const QType& qtype, std::int64_t row_length);

/// Whether `quantizer` is absmax_quantizer() or max_quantizer(), which kernels compute too.
bool is_by_extremes(const Quantizer& quantizer);

/// What quantizing a weight of dtype double, float, bfloat16 or half gives. Scale and shift have
/// the weight's dtype where they survive the rounding, else fp32; the codes are computed for the
/// rounded values. Does not look for non-finite elements: check_finite does.
WeightCodes quantize(const at::Tensor& weight, const WeightScheme& scheme);

/// The same for a weight that may not be finite: then raises as check_finite() does. Reads the
/// weight less often than the two one after the other.
WeightCodes quantize_finite(const at::Tensor& weight, const WeightScheme& scheme,
                            std::string_view name);

/// `codes` with scale and shift in `dtype`, as quantize() stores them for weights of that dtype.
WeightCodes round_scales(const WeightCodes& codes, at::ScalarType dtype);

/// Raises ValueError naming `name` and the index of the first NaN or Inf of `weight`.
void check_finite(const at::Tensor& weight, std::string_view name);

}  // namespace quantal
