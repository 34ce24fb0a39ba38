// TorchScript modules: their weights are attributes, their types are known by name.
#include <torch/script.h>

#include <set>

#include "model/modules.h"

namespace quantal {
namespace {

using torch::jit::Module;

// "__torch__.torch.nn.modules.linear.___torch_mangle_3.Linear" -> "Linear".
std::string type_name(const Module& module) { return module.type()->name()->name(); }

bool has_tensor(const Module& module, const std::string& name) {
  return module.hasattr(name) && module.attr(name).isTensor() &&
         module.attr(name).toTensor().defined();
}

// Scripted RNNs read their weights from a list beside the attributes.
std::vector<size_t> places_in_flat_weights(const Module& module, const at::Tensor& tensor) {
  std::vector<size_t> places;
  if (!module.hasattr("_flat_weights") || !module.attr("_flat_weights").isTensorList()) {
    return places;
  }
  const auto list = module.attr("_flat_weights").toTensorList();
  for (size_t i = 0; i < list.size(); ++i) {
    if (at::Tensor(list.get(i)).is_same(tensor)) places.push_back(i);
  }
  return places;
}

// Scripted modules keep max_norm as a constant of their type, traced ones have no attribute of it.
bool renormalizes(const Module& module) {
  if (module.hasattr("max_norm")) return !module.attr("max_norm").isNone();
  const auto constant = module.type()->findConstant("max_norm");
  return constant && !constant->isNone();
}

ModuleEntry entry_of(const std::string& name, Module module) {
  const std::string type = type_name(module);
  const ModuleType* known = find_module_type(type);
  ModuleEntry entry{name,
                    type,
                    known != nullptr ? known->kind : ModuleKind::kOther,
                    renormalizes(module) ? kRenormalizes : "",
                    {}};
  const auto add = [&](const std::string& parameter, const at::Tensor& tensor, bool is_buffer) {
    Slot slot;
    slot.parameter = parameter;
    slot.tensor = tensor;
    slot.is_buffer = is_buffer;
    const std::vector<size_t> places = places_in_flat_weights(module, tensor);
    slot.handles = 1 + static_cast<int>(places.size());
    slot.quantizable =
        !is_buffer && known != nullptr && is_quantizable_parameter(*known, parameter);
    slot.has_bias = known != nullptr && has_tensor(module, known->bias);
    slot.replace = [module, parameter, places](const at::Tensor& value) mutable {
      module.setattr(parameter, value);
      for (const size_t place : places) {
        module.attr("_flat_weights").toTensorList().set(place, value);
      }
    };
    entry.slots.push_back(std::move(slot));
  };
  for (const auto parameter : module.named_parameters(/*recurse=*/false)) {
    add(parameter.name, parameter.value, false);
  }
  for (const auto buffer : module.named_buffers(/*recurse=*/false)) {
    add(buffer.name, buffer.value, true);
  }
  return entry;
}

void add_entries(const std::string& name, const Module& module, std::set<const void*>& seen,
                 std::vector<ModuleEntry>& entries) {
  if (!seen.insert(module._ivalue().get()).second) return;
  entries.push_back(entry_of(name, module));
  for (const auto child : module.named_children()) {
    add_entries(name.empty() ? child.name : name + "." + child.name, child.value, seen, entries);
  }
}

}  // namespace

std::vector<ModuleEntry> script_modules(Module& root) {
  std::set<const void*> seen;
  std::vector<ModuleEntry> entries;
  add_entries("", root, seen, entries);
  return entries;
}

}  // namespace quantal
