#pragma once

#include <concepts>
#include <memory>

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <quantal/api.h>

namespace torch::jit {
struct Module;
}  // namespace torch::jit

namespace quantal {

/// What every function on models takes: any torch::nn::Module (also on the stack), module holder
/// (torch::nn::Linear, Sequential, …) or torch::jit::Module. Refers to the module: made by implicit
/// conversion for one call.
class QUANTAL_API Model {
 public:
  Model(torch::nn::Module& module) : nn_(&module) {}
  template <typename Impl>
  Model(const torch::nn::ModuleHolder<Impl>& holder) : nn_(holder.ptr().get()) {}
  Model(torch::jit::Module& module) : script_(&module) {}

  /// Exactly one of the two is not null.
  torch::nn::Module* nn_module() const { return nn_; }
  torch::jit::Module* script_module() const { return script_; }

 private:
  torch::nn::Module* nn_ = nullptr;
  torch::jit::Module* script_ = nullptr;
};

/// A copy of `module` that shares nothing with it: parameters, quantized weights (live and frozen),
/// ties between them and calibrated scales. torch::nn::Module::clone() cannot copy quantized
/// weights. c10::Error where the module is not cloneable.
QUANTAL_API std::shared_ptr<torch::nn::Module> clone(torch::nn::Module& module);
QUANTAL_API torch::jit::Module clone(torch::jit::Module& module);
template <typename Holder>
  requires std::derived_from<Holder, torch::nn::ModuleHolder<typename Holder::ContainedType>>
Holder clone(const Holder& holder) {
  auto copy = clone(static_cast<torch::nn::Module&>(*holder.ptr()));
  return Holder(std::dynamic_pointer_cast<typename Holder::ContainedType>(copy));
}

/// Moves parameters and buffers, quantized or not. Frozen codes stay as they are; their scales
/// follow the dtype where it can hold them.
QUANTAL_API void to(const Model& model, c10::Device device);
QUANTAL_API void to(const Model& model, c10::ScalarType dtype);

}  // namespace quantal
