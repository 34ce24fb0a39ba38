#include "ops/cpu_kernels.h"

#include <ATen/ATen.h>
#include <ATen/Config.h>
#include <ATen/Parallel.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>

#include "kernels/activation_codes.h"

#if AT_PARALLEL_OPENMP && !defined(_OPENMP)
#error "at::parallel_for() would run on one thread: compile this file with -fopenmp"
#endif

namespace quantal {
namespace {

using kernels::FloatType;

// Below so many multiplications, other threads cost more than they bring.
constexpr std::int64_t kSerialProducts = 1 << 15;

constexpr std::int64_t kHugePage = 2 << 20;

void on_torch_threads(std::int64_t count,
                      const std::function<void(std::int64_t, std::int64_t)>& body) {
  at::parallel_for(0, count, 1, body);
}

}  // namespace

std::optional<FloatType> float_type(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return FloatType::kF32;
    case at::kBFloat16:
      return FloatType::kBF16;
    case at::kHalf:
      return FloatType::kF16;
    default:
      return std::nullopt;
  }
}

kernels::ParallelFor threads_for(std::int64_t products) {
  return products < kSerialProducts ? kernels::serial_for : on_torch_threads;
}

at::Tensor weight_memory(at::IntArrayRef sizes, at::ScalarType dtype) {
#if defined(__linux__)
  const std::int64_t bytes =
      c10::multiply_integers(sizes) * static_cast<std::int64_t>(c10::elementSize(dtype));
  if (bytes >= 2 * kHugePage) {
    const std::int64_t size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    void* memory = std::aligned_alloc(kHugePage, size);
    TORCH_CHECK(memory != nullptr, "[quantal] out of memory: ", size, " bytes for a weight");
    madvise(memory, size, MADV_HUGEPAGE);
    return at::from_blob(memory, sizes, std::free, dtype);
  }
#endif
  return at::empty(sizes, dtype);
}

at::Tensor as_tokens(const at::Tensor& x, std::int64_t columns) {
  const at::Tensor tokens = x.dim() == 2 ? x : x.reshape({-1, columns});
  return tokens.stride(1) == 1 || columns == 1 ? tokens : tokens.contiguous();
}

at::Tensor output_for(const at::Tensor& x, std::int64_t rows, at::ScalarType dtype) {
  at::DimVector sizes(x.sizes());
  sizes.back() = rows;
  return at::empty(sizes, x.options().dtype(dtype));
}

const void* data_of(const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }

at::Tensor kernel_bias(const at::Tensor& bias, std::int64_t rows) {
  const bool fits = bias.defined() && bias.dim() == 1 && bias.size(0) == rows;
  return fits ? bias.contiguous() : at::Tensor();
}

at::Tensor with_bias(at::Tensor y, const at::Tensor& bias, std::int64_t rows) {
  if (bias.defined() && !kernel_bias(bias, rows).defined()) y.add_(bias);
  return y;
}

Isa kernel_isa() {
  static const Isa chosen = [] {
    const Result<Isa> active = active_isa();
    TORCH_CHECK(active.status().ok(), active.status().message());
    return active.value();
  }();
  return chosen;
}

bool is_cpu_activation(const at::Tensor& x) {
  return x.device().is_cpu() && x.layout() == at::kStrided && float_type(x.scalar_type()) &&
         !x.is_neg() && !x._is_zerotensor();
}

std::optional<at::Tensor> int8_codes(const at::Tensor& x, float scale) {
  const at::Tensor dense =
      x.is_non_overlapping_and_dense() ? x : x.contiguous(x.suggest_memory_format());
  at::Tensor codes = at::empty_like(dense, dense.options().dtype(at::kChar));
  const bool all_have_codes = kernels::quantize_codes(
      kernel_isa(), dense.const_data_ptr(), *float_type(dense.scalar_type()), dense.numel(), scale,
      codes.mutable_data_ptr<std::int8_t>(), threads_for(dense.numel()));
  return all_have_codes ? std::optional(codes) : std::nullopt;
}

at::Tensor dequantize_on_cpu(const at::Tensor& codes, float scale, at::ScalarType dtype) {
  at::Tensor value = at::empty_like(codes, codes.options().dtype(dtype));
  kernels::dequantize_codes(kernel_isa(), codes.const_data_ptr<std::int8_t>(), codes.numel(), scale,
                            *float_type(dtype), value.mutable_data_ptr(),
                            threads_for(codes.numel()));
  return value;
}

}  // namespace quantal
