#pragma once

#include <functional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include <quantal/model.h>

namespace quantal {

/// What quantal does with a kind of module.
enum class ModuleKind {
  kOther,
  kWeighted,     ///< weights only: Bilinear, Embedding(Bag), RNNs and their cells
  kCompute,      ///< weights and activations: Linear, Conv*, MultiheadAttention
  kNormalizing,  ///< activations only: LayerNorm
};

/// One tensor of a model.
struct Slot {
  std::string parameter;  ///< its name within the module
  at::Tensor tensor;
  bool is_buffer = false;
  bool quantizable = false;  ///< a weight that quantal knows how to replace
  bool has_bias = false;     ///< the bias that is added to what this weight computes
  int handles = 0;           ///< how many handles the model itself holds
  std::function<void(const at::Tensor&)> replace;  ///< puts another tensor in all of them
};

/// One module of a model. A module that occurs under several names is listed once.
struct ModuleEntry {
  std::string name;  ///< "" for the root
  std::string type;  ///< "Linear", "Conv2d", …
  ModuleKind kind = ModuleKind::kOther;
  std::vector<Slot> slots;

  /// The key of a slot in a checkpoint: "encoder.0.weight".
  std::string key(const Slot& slot) const {
    return name.empty() ? slot.parameter : name + "." + slot.parameter;
  }
};

/// Every module of `model`, the root first, children in order.
std::vector<ModuleEntry> modules_of(const Model& model);

/// How a library's modules are recognized: one row a type.
struct ModuleType {
  const char* name;
  ModuleKind kind;
  /// The parameters to quantize; a name that ends in '*' is a prefix.
  std::vector<std::string> weights;
  const char* bias = "bias";
};

/// The row of a type name ("Linear"), or null.
const ModuleType* find_module_type(const std::string& name);
bool is_quantizable_parameter(const ModuleType& type, const std::string& parameter);

std::vector<ModuleEntry> nn_modules(torch::nn::Module& root);
std::vector<ModuleEntry> script_modules(torch::jit::Module& root);

}  // namespace quantal
