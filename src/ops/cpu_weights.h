#pragma once

#include <cstdint>
#include <optional>

#include <ATen/core/Tensor.h>

#include "kernels/packed_layout.h"
#include "ops/weight_codes.h"

/// Making and reading canonical codes with the CPU's kernels, which compute what the ATen functions
/// of weight_codes.h do, bit for bit.
namespace quantal {

/// The codes of `weight` by the extremes of its groups: what absmax and max choose. Nothing where
/// kernels do not take it: on other devices, of dtype double, empty, with a NaN or infinity, or
/// with numbers so large that WeightCodes::wide would be set.
std::optional<WeightCodes> quantize_on_cpu(const at::Tensor& weight, const QType& qtype,
                                           std::int64_t group_size);

/// The index of the first NaN or infinity, in the order of a contiguous tensor; -1 without one.
/// Precondition: is_cpu_activation(x).
std::int64_t find_non_finite_on_cpu(const at::Tensor& x);

/// What decode_weight() gives, dense: by a kernel where one takes the codes.
at::Tensor dequantize(const WeightCodes& codes, at::ScalarType dtype);

/// Whether gather_on_cpu() takes them.
bool gathers_on_cpu(const WeightCodes& codes, at::ScalarType dtype);
/// What kernels are told of them. Precondition: their scales have a type of the kernels.
kernels::WeightSpec spec_of(const WeightCodes& codes);
/// What kernels read of codes that gathers_on_cpu() takes.
struct CanonicalPointers {
  explicit CanonicalPointers(const WeightCodes& codes);
  kernels::CanonicalWeight weight() const;

  at::Tensor data, scale, shift;
  kernels::WeightSpec spec;
};
/// Rows [begin, begin + out.size(0)) of the value into `out`, contiguous, of a dtype that
/// gathers_on_cpu() takes.
void dequantize_into(const WeightCodes& codes, std::int64_t begin, const at::Tensor& out);
/// What decode_rows() gives.
at::Tensor gather_on_cpu(const WeightCodes& codes, const at::Tensor& indices, at::ScalarType dtype);

/// Raises IndexError where one of `indices` (contiguous, int64, on the CPU) is no row.
void check_indices(const at::Tensor& indices, std::int64_t rows);

}  // namespace quantal
