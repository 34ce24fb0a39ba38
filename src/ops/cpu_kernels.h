#pragma once

#include <optional>

#include <ATen/core/Tensor.h>

#include <quantal/isa.h>

#include "kernels/packed_layout.h"

/// What calling torch-free kernels from torch takes.
namespace quantal {

/// The kernels' name of a dtype, or nothing where they do not take it.
std::optional<kernels::FloatType> float_type(at::ScalarType dtype);

/// libtorch's threads; the calling one alone where there is too little to compute.
kernels::ParallelFor threads_for(std::int64_t products);

/// Uninitialised memory for codes. Large ones lie on huge pages where the system has them: a kernel
/// that streams through a weight waits for address translation otherwise, and one that writes it
/// for the first time for the pages themselves.
at::Tensor weight_memory(at::IntArrayRef sizes, at::ScalarType dtype);

/// x (…, columns) as a matrix whose rows have contiguous elements and are any stride apart.
at::Tensor as_tokens(const at::Tensor& x, std::int64_t columns);
/// Uninitialised, of x's sizes with `rows` in the place of the last.
at::Tensor output_for(const at::Tensor& x, std::int64_t rows, at::ScalarType dtype);
/// Null where t is undefined.
const void* data_of(const at::Tensor& t);

/// Kernels add one number a row: the bias that they take, undefined where with_bias() has to add
/// it.
at::Tensor kernel_bias(const at::Tensor& bias, std::int64_t rows);
/// y with a bias that kernel_bias() did not pass on broadcast to it.
at::Tensor with_bias(at::Tensor y, const at::Tensor& bias, std::int64_t rows);

/// active_isa(); raises where QUANTAL_ISA names what this processor cannot run.
Isa kernel_isa();

/// Whether kernels read the float values of `x`, once they are contiguous.
bool is_cpu_activation(const at::Tensor& x);

/// x as int8 codes of one scale, in the order of its memory; contiguous where that has gaps.
/// Nothing where x has a NaN, which no code holds. Precondition: is_cpu_activation(x).
std::optional<at::Tensor> int8_codes(const at::Tensor& x, float scale);
/// The value of dense int8 codes.
at::Tensor dequantize_on_cpu(const at::Tensor& codes, float scale, at::ScalarType dtype);

}  // namespace quantal
