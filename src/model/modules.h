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
  at::Tensor tensor;      ///< what the forward pass reads
  bool is_buffer = false;
  bool quantizable = false;  ///< a weight that quantal knows how to replace
  bool has_bias = false;     ///< the bias that is added to what this weight computes
  /// False where another tensor is registered under the name ("head->weight = embedding->weight"
  /// ties what forward() reads and nothing else).
  bool registered = true;
  int handles = 0;                                 ///< how many handles the model itself holds
  std::function<void(const at::Tensor&)> replace;  ///< puts another tensor in all of them
  /// Puts another tensor where only the forward pass reads it; empty where that is not known.
  std::function<void(const at::Tensor&)> replace_member;
};

/// One module of a model. A module that occurs under several names is listed once.
struct ModuleEntry {
  std::string name;  ///< "" for the root
  std::string type;  ///< "Linear", "Conv2d", …
  ModuleKind kind = ModuleKind::kOther;
  std::string unsupported;  ///< why its weights cannot be quantized; empty where they can
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

constexpr const char* kRenormalizes = "max_norm renormalizes its weight in every forward pass";

/// `every_name`: a module that occurs under several names is listed under each.
std::vector<ModuleEntry> nn_modules(torch::nn::Module& root, bool every_name = false);
std::vector<ModuleEntry> script_modules(torch::jit::Module& root);

}  // namespace quantal
