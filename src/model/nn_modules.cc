// torch::nn modules: their weights live in a typed member and in the module's parameters_, and both
// are replaced.
#include <torch/nn.h>

#include <set>

#include "model/modules.h"

namespace quantal {
namespace {

using torch::nn::Module;
using Members = std::vector<std::pair<std::string, at::Tensor*>>;

// Reaches protected members through pointers to members of a derived class.
struct ModuleAccess : Module {
  static auto& parameters(Module& module) { return module.*(&ModuleAccess::parameters_); }
};

template <typename Impl>
struct RnnAccess : torch::nn::detail::RNNImplBase<Impl> {
  using Base = torch::nn::detail::RNNImplBase<Impl>;
  static void list(Impl& rnn, Members& members) {
    auto& names = static_cast<Base&>(rnn).*(&RnnAccess::flat_weights_names_);
    auto& weights = static_cast<Base&>(rnn).*(&RnnAccess::flat_weights_);
    for (size_t i = 0; i < weights.size(); ++i) members.emplace_back(names[i], &weights[i]);
  }
};

// A type's name and the typed members that its forward pass reads.
struct Recognized {
  std::string type;
  Members members;

  at::Tensor* member(const std::string& name) const {
    for (const auto& [member, tensor] : members) {
      if (member == name && tensor->defined()) return tensor;
    }
    return nullptr;
  }
};

template <typename Impl>
bool has_weight(Module& module, const char* type, Recognized& found) {
  auto* impl = dynamic_cast<Impl*>(&module);
  if (impl == nullptr) return false;
  found = {type, {{"weight", &impl->weight}}};
  if constexpr (requires { impl->bias; }) found.members.emplace_back("bias", &impl->bias);
  return true;
}

template <typename Impl>
bool is_rnn(Module& module, const char* type, Recognized& found) {
  auto* impl = dynamic_cast<Impl*>(&module);
  if (impl == nullptr) return false;
  found.type = type;
  RnnAccess<Impl>::list(*impl, found.members);
  return true;
}

template <typename Impl>
bool is_cell(Module& module, const char* type, Recognized& found) {
  auto* impl = dynamic_cast<Impl*>(&module);
  if (impl == nullptr) return false;
  found = {type,
           {{"weight_ih", &impl->weight_ih},
            {"weight_hh", &impl->weight_hh},
            {"bias_ih", &impl->bias_ih},
            {"bias_hh", &impl->bias_hh}}};
  return true;
}

bool is_attention(Module& module, Recognized& found) {
  auto* impl = dynamic_cast<torch::nn::MultiheadAttentionImpl*>(&module);
  if (impl == nullptr) return false;
  found = {"MultiheadAttention",
           {{"in_proj_weight", &impl->in_proj_weight},
            {"q_proj_weight", &impl->q_proj_weight},
            {"k_proj_weight", &impl->k_proj_weight},
            {"v_proj_weight", &impl->v_proj_weight},
            {"in_proj_bias", &impl->in_proj_bias},
            {"bias_k", &impl->bias_k},
            {"bias_v", &impl->bias_v}}};
  return true;
}

// "torch::nn::BatchNorm2dImpl" -> "BatchNorm2d".
std::string short_type_name(const Module& module) {
  std::string name = module.name();
  if (const size_t colon = name.rfind("::"); colon != std::string::npos) name.erase(0, colon + 2);
  if (name.size() > 4 && name.ends_with("Impl")) name.resize(name.size() - 4);
  return name;
}

Recognized recognize(Module& m) {
  using namespace torch::nn;
  Recognized found;
  const bool known =
      has_weight<LinearImpl>(m, "Linear", found) || has_weight<Conv1dImpl>(m, "Conv1d", found) ||
      has_weight<Conv2dImpl>(m, "Conv2d", found) || has_weight<Conv3dImpl>(m, "Conv3d", found) ||
      has_weight<ConvTranspose1dImpl>(m, "ConvTranspose1d", found) ||
      has_weight<ConvTranspose2dImpl>(m, "ConvTranspose2d", found) ||
      has_weight<ConvTranspose3dImpl>(m, "ConvTranspose3d", found) ||
      has_weight<BilinearImpl>(m, "Bilinear", found) ||
      has_weight<EmbeddingImpl>(m, "Embedding", found) ||
      has_weight<EmbeddingBagImpl>(m, "EmbeddingBag", found) ||
      has_weight<LayerNormImpl>(m, "LayerNorm", found) || is_rnn<LSTMImpl>(m, "LSTM", found) ||
      is_rnn<GRUImpl>(m, "GRU", found) || is_rnn<RNNImpl>(m, "RNN", found) ||
      is_cell<LSTMCellImpl>(m, "LSTMCell", found) || is_cell<GRUCellImpl>(m, "GRUCell", found) ||
      is_cell<RNNCellImpl>(m, "RNNCell", found) || is_attention(m, found);
  if (!known) found.type = short_type_name(m);
  return found;
}

Slot parameter_slot(Module& module, const std::string& name, const Recognized& known,
                    const ModuleType* type) {
  at::Tensor* entry = &ModuleAccess::parameters(module)[name];
  at::Tensor* member = known.member(name);
  Slot slot;
  slot.parameter = name;
  slot.tensor = member != nullptr ? *member : *entry;
  slot.registered = entry->is_same(slot.tensor);
  std::vector<at::Tensor*> holders;
  if (slot.registered) holders.push_back(entry);
  if (member != nullptr) holders.push_back(member);
  slot.handles = static_cast<int>(holders.size());
  slot.quantizable = type != nullptr && member != nullptr && is_quantizable_parameter(*type, name);
  slot.has_bias = type != nullptr && known.member(type->bias) != nullptr;
  slot.replace = [holders](const at::Tensor& tensor) {
    for (at::Tensor* holder : holders) *holder = tensor;
  };
  if (member != nullptr) slot.replace_member = [member](const at::Tensor& t) { *member = t; };
  return slot;
}

bool renormalizes(Module& module) {
  using namespace torch::nn;
  if (auto* embedding = dynamic_cast<EmbeddingImpl*>(&module)) {
    return embedding->options.max_norm().has_value();
  }
  if (auto* bag = dynamic_cast<EmbeddingBagImpl*>(&module)) {
    return bag->options.max_norm().has_value();
  }
  return false;
}

ModuleEntry entry_of(const std::string& name, Module& module) {
  const Recognized known = recognize(module);
  const ModuleType* type = find_module_type(known.type);
  ModuleEntry entry{name,
                    known.type,
                    type != nullptr ? type->kind : ModuleKind::kOther,
                    renormalizes(module) ? kRenormalizes : "",
                    {}};
  for (const auto& item : ModuleAccess::parameters(module)) {
    if (!item.value().defined()) continue;
    entry.slots.push_back(parameter_slot(module, item.key(), known, type));
  }
  for (const auto& item : module.named_buffers(/*recurse=*/false)) {
    if (!item.value().defined()) continue;
    Slot slot;
    slot.parameter = item.key();
    slot.tensor = item.value();
    slot.is_buffer = true;
    entry.slots.push_back(std::move(slot));
  }
  return entry;
}

void add_entries(const std::string& name, Module& module, std::set<const Module*>* seen,
                 std::vector<ModuleEntry>& entries) {
  if (seen != nullptr && !seen->insert(&module).second) return;
  entries.push_back(entry_of(name, module));
  for (const auto& child : module.named_children()) {
    add_entries(name.empty() ? child.key() : name + "." + child.key(), *child.value(), seen,
                entries);
  }
}

}  // namespace

std::vector<ModuleEntry> nn_modules(Module& root, bool every_name) {
  std::set<const Module*> seen;
  std::vector<ModuleEntry> entries;
  add_entries("", root, every_name ? nullptr : &seen, entries);
  return entries;
}

}  // namespace quantal
