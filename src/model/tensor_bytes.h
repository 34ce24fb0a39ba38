#pragma once

#include <string>

#include <ATen/core/Tensor.h>

#include <quantal/safetensors.h>

/// ATen tensors as safetensors knows them.
namespace quantal {

/// Raises what a torch-free function returned: c10::Error for kIo and kOutOfMemory, ValueError for
/// everything that a file or a caller did wrong.
void raise_unless_ok(const Status& status);

template <typename T>
T value_or_raise(Result<T> result) {
  raise_unless_ok(result.status());
  return std::move(result).value();
}

/// ValueError naming `name` for a dtype that safetensors has not (complex double, quantized).
safetensors::Dtype file_dtype(at::ScalarType dtype, const std::string& name);
/// ValueError naming `name` for a dtype that ATen has not.
at::ScalarType aten_dtype(safetensors::Dtype dtype, const std::string& name);

/// `bytes` as a CPU tensor, without a copy: it keeps them alive.
at::Tensor tensor_over(const safetensors::Bytes& bytes, const safetensors::TensorInfo& info);

}  // namespace quantal
