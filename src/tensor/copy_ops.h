#pragma once

#include <ATen/core/Tensor.h>

/// Copies and comparisons of quantized tensors: PrivateUse3 kernels with ATen's signatures.
namespace quantal {

at::Tensor clone(const at::Tensor& t, std::optional<at::MemoryFormat> memory_format);
at::Tensor to_copy(const at::Tensor& t, std::optional<at::ScalarType> dtype,
                   std::optional<at::Layout> layout, std::optional<at::Device> device,
                   std::optional<bool> pin_memory, bool non_blocking,
                   std::optional<at::MemoryFormat> memory_format);
at::Tensor& copy_into(at::Tensor& target, const at::Tensor& source, bool non_blocking);
/// set_: torch::load() into a quantized weight. Raises.
at::Tensor& set_source(at::Tensor& target, const at::Tensor& source);
/// Whether set_data() may give `from` to `self`: quantized tensors, and floats for the latent of a
/// live weight. Raises where a plain tensor would become a quantized one, as in
/// torch::nn::Module::clone().
bool has_compatible_type(const at::Tensor& self, const at::Tensor& from);
bool equal(const at::Tensor& a, const at::Tensor& b);
at::Tensor alias(const at::Tensor& t);

}  // namespace quantal
