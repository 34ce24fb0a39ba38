#include <quantal/quantize.h>

#include <fnmatch.h>
#include <torch/torch.h>

#include <algorithm>
#include <set>

#include "model/layers.h"
#include "tensor/weights.h"

namespace quantal {
namespace {

using Reasons = std::map<std::string, std::string>;

bool is_layer(const ModuleEntry& entry) { return entry.kind != ModuleKind::kOther; }

bool matches(const std::string& pattern, const std::string& name) {
  return fnmatch(pattern.c_str(), name.c_str(), 0) == 0;
}

void check_patterns(const std::vector<std::string>& patterns, const char* option,
                    const std::vector<ModuleEntry>& modules) {
  for (const std::string& pattern : patterns) {
    bool found = false;
    for (const ModuleEntry& entry : modules) {
      found = found || (is_layer(entry) && matches(pattern, entry.name));
    }
    TORCH_CHECK_VALUE(found, "[quantal::quantize] ", option, " pattern '", pattern,
                      "' matches no layer");
  }
}

// Why a layer is left alone; empty where it is to be quantized.
std::string reason_to_skip(const ModuleEntry& entry, const QuantizeOptions& options) {
  bool included = options.include.empty();
  for (const std::string& pattern : options.include) {
    included = included || matches(pattern, entry.name);
  }
  if (!included) return "matches no include pattern";
  for (const std::string& pattern : options.exclude) {
    if (matches(pattern, entry.name)) return "excluded by '" + pattern + "'";
  }
  if (!entry.unsupported.empty()) return entry.unsupported;
  if (entry.kind == ModuleKind::kNormalizing && !options.activations) {
    return "has activations to quantize only";
  }
  if (entry.kind == ModuleKind::kWeighted && !options.weights) {
    return "has weights to quantize only";
  }
  return "";
}

struct Layer {
  const ModuleEntry* entry;
  const Slot* slot;
};

// All the places that hold one tensor.
using Owners = std::vector<Layer>;

// Every tensor of the model with its owners, in the order in which the model has them.
std::vector<Owners> owners_of(const std::vector<ModuleEntry>& modules) {
  std::vector<Owners> all;
  std::map<const c10::TensorImpl*, size_t> positions;
  for (const ModuleEntry& entry : modules) {
    for (const Slot& slot : entry.slots) {
      const auto [position, is_new] =
          positions.try_emplace(slot.tensor.unsafeGetTensorImpl(), all.size());
      if (is_new) all.emplace_back();
      all[position->second].push_back({&entry, &slot});
    }
  }
  return all;
}

// What the layers that share a weight make of the activations that they take and give.
std::optional<QType> activations_for(const Owners& layers, const QuantizeOptions& options) {
  for (const Layer& layer : layers) {
    if (layer.entry->kind != ModuleKind::kWeighted) return options.activations;
  }
  return std::nullopt;
}

// The state that those layers share, named after the first that has activations.
std::shared_ptr<LayerState> layer_for(const Owners& layers, std::optional<QType> activations) {
  const auto has_activations = [](const Layer& layer) {
    return layer.entry->kind != ModuleKind::kWeighted;
  };
  auto named = std::find_if(layers.begin(), layers.end(), has_activations);
  if (named == layers.end()) named = layers.begin();
  auto state = new_layer(*named->entry, *named->slot, activations);
  state->has_bias = std::any_of(layers.begin(), layers.end(),
                                [](const Layer& layer) { return layer.slot->has_bias; });
  return state;
}

std::string_view name_of(const std::optional<QType>& qtype) {
  return qtype ? qtype->name : std::string_view("none");
}

// Whether a quantized weight is already what `options` ask for; anything else is an error.
void check_same(const Owners& layers, const QuantizeOptions& options) {
  const Layer& first = layers.front();
  const auto cell = cell_of(*first.slot);
  const bool has_weights = first.entry->kind != ModuleKind::kNormalizing;
  const std::optional<QType> wanted = has_weights ? options.weights : std::nullopt;
  std::optional<QType> weights, activations;
  if (cell->scheme()) weights = cell->scheme()->qtype;
  if (cell->layer) activations = cell->layer->activations;
  bool same = weights == wanted && activations == activations_for(layers, options);
  if (same && wanted) {
    const WeightOptions weight{*wanted, options.group_size, options.allow_short_group,
                               options.quantizer};
    same = resolve_scheme(first.slot->tensor, weight, first.entry->key(*first.slot)).group_size ==
           cell->scheme()->group_size;
  }
  TORCH_CHECK_VALUE(same, "[quantal::quantize] '", first.entry->key(*first.slot),
                    "' is already quantized in another way (weights ", name_of(weights),
                    ", activations ", name_of(activations), ")");
}

bool is_supported(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 ||
         dtype == at::kHalf;
}

class Quantization {
 public:
  Quantization(const Model& model, const QuantizeOptions& options,
               torch::optim::Optimizer* optimizer)
      : model_(model), options_(options), optimizer_(optimizer), modules_(modules_of(model)) {}

  Report run() {
    TORCH_CHECK_VALUE(options_.weights || options_.activations,
                      "[quantal::quantize] expected a qtype for weights, activations or both");
    TORCH_CHECK_VALUE(!options_.activations || !options_.activations->is_affine(),
                      "[quantal::quantize] expected an 8-bit qtype for activations, got ",
                      options_.activations->name);
    check_patterns(options_.include, "include", modules_);
    check_patterns(options_.exclude, "exclude", modules_);
    for (const Owners& layers : owners_of(modules_)) plan(layers);
    TORCH_CHECK_VALUE(!plan_.empty() || already_quantized_ > 0,
                      "[quantal::quantize] the model has no layer to quantize", why_nothing());
    for (const Planned& planned : plan_) apply(planned);
    Report result = report(model_);
    for (LayerReport& layer : result.layers) {
      const auto reason = reasons_.find(layer.name);
      if (!layer.left_alone.empty() && reason != reasons_.end()) layer.left_alone = reason->second;
    }
    return result;
  }

 private:
  struct Planned {
    Owners layers;
    std::optional<WeightScheme> scheme;
  };

  // Decides about one weight. All of the modules that share it must agree.
  void plan(const Owners& layers) {
    std::string reason;
    bool any_layer = false;
    for (const Layer& layer : layers) {
      any_layer = any_layer || layer.slot->quantizable;
      if (!reason.empty()) continue;
      reason = layer.slot->quantizable ? reason_to_skip(*layer.entry, options_)
                                       : std::string("no quantized kernel");
      if (!reason.empty() && layers.size() > 1) {
        reason = "shares its weight with '" + layer.entry->name + "' (" + reason + ")";
      }
    }
    if (!any_layer) return;
    const Layer& first = layers.front();
    const at::Tensor& weight = first.slot->tensor;
    if (reason.empty() && is_weight(weight)) {
      check_same(layers, options_);
      ++already_quantized_;
      return;
    }
    if (reason.empty() && !is_supported(weight.scalar_type())) {
      reason = std::string("its weight is ") + at::toString(weight.scalar_type());
    }
    if (!reason.empty()) {
      for (const Layer& layer : layers) reasons_[layer_name(*layer.entry, *layer.slot)] = reason;
      return;
    }
    check_outside_handles(layers);
    plan_.push_back({layers, scheme_for(first)});
  }

  std::optional<WeightScheme> scheme_for(const Layer& layer) const {
    const std::string name = layer.entry->key(*layer.slot);
    check_finite(layer.slot->tensor, name);
    if (!options_.weights || layer.entry->kind == ModuleKind::kNormalizing) return std::nullopt;
    return resolve_scheme(
        layer.slot->tensor,
        {*options_.weights, options_.group_size, options_.allow_short_group, options_.quantizer},
        name);
  }

  std::string why_nothing() const {
    if (!reasons_.empty()) return ": '" + reasons_.begin()->first + "' " + reasons_.begin()->second;
    const bool is_empty_script =
        model_.script_module() != nullptr &&
        std::all_of(modules_.begin(), modules_.end(),
                    [](const ModuleEntry& entry) { return entry.slots.empty(); });
    return is_empty_script ? ": a frozen TorchScript module keeps its weights as constants, so "
                             "quantize before torch.jit.freeze()"
                           : "";
  }

  // A handle that would keep the float weight, such as that of an optimizer built before.
  void check_outside_handles(const Owners& layers) const {
    if (options_.ignore_outside_handles) return;
    const at::Tensor& weight = layers.front().slot->tensor;
    size_t known = 0;
    for (const Layer& layer : layers) known += static_cast<size_t>(layer.slot->handles) + 1;
    if (optimizer_ != nullptr) {
      for (const auto& group : optimizer_->param_groups()) {
        for (const at::Tensor& parameter : group.params()) known += parameter.is_same(weight);
      }
    }
    TORCH_CHECK_VALUE(!is_held_outside(weight, known),
                      "[quantal::quantize] something outside the "
                      "model holds '",
                      layers.front().entry->key(*layers.front().slot),
                      "'. An optimizer built before quantize() would go on stepping the float "
                      "weight: build it afterwards, or call quantize(model, options, optimizer). "
                      "Where the handle does no harm (an output whose backward has not run holds "
                      "weights, too), set ignore_outside_handles");
  }

  void apply(const Planned& planned) {
    const at::Tensor weight = planned.layers.front().slot->tensor;
    const at::Tensor live = make_live_weight(weight, planned.scheme);
    live.mutable_grad() = weight.grad();
    impl_of(live)->weight->layer =
        layer_for(planned.layers, activations_for(planned.layers, options_));
    for (const Layer& layer : planned.layers) layer.slot->replace(live);
    if (optimizer_ == nullptr) return;
    for (auto& group : optimizer_->param_groups()) {
      for (at::Tensor& parameter : group.params()) {
        if (parameter.is_same(weight)) parameter = live;
      }
    }
    auto& states = optimizer_->state();
    if (auto found = states.find(weight.unsafeGetTensorImpl()); found != states.end()) {
      auto kept = std::move(found->second);
      states.erase(found);
      states[live.unsafeGetTensorImpl()] = std::move(kept);
    }
  }

  const Model& model_;
  const QuantizeOptions& options_;
  torch::optim::Optimizer* optimizer_;
  std::vector<ModuleEntry> modules_;
  std::vector<Planned> plan_;
  Reasons reasons_;
  int already_quantized_ = 0;
};

}  // namespace

bool is_held_outside(const at::Tensor& weight, size_t handles) {
  // A graph that is still there holds the weight as the place where gradients arrive.
  if (torch::autograd::impl::try_get_grad_accumulator(weight)) ++handles;
  return weight.use_count() > handles;
}

Report quantize(const Model& model, const QuantizeOptions& options) {
  return Quantization(model, options, nullptr).run();
}

Report quantize(const Model& model, const QuantizeOptions& options,
                torch::optim::Optimizer& optimizer) {
  return Quantization(model, options, &optimizer).run();
}

void freeze(const Model& model) {
  const std::vector<ModuleEntry> modules = modules_of(model);
  std::set<const c10::TensorImpl*> seen;
  std::vector<at::Tensor> live;
  for (const ModuleEntry& entry : modules) {
    for (const Slot& slot : entry.slots) {
      if (!is_live(slot.tensor) || !seen.insert(slot.tensor.unsafeGetTensorImpl()).second) continue;
      check_finite(cell_of(slot)->latent(), entry.key(slot));
      live.push_back(slot.tensor);
    }
  }
  for (const at::Tensor& weight : live) {
    if (const auto& layer = impl_of(weight)->weight->layer) layer->snr_db = weight_snr_db(weight);
    freeze(weight);
  }
}

std::map<std::string, LayerTypes> quantization_map(const Model& model) {
  std::map<std::string, LayerTypes> map;
  for (const ModuleEntry& entry : modules_of(model)) {
    for (const Slot& slot : entry.slots) {
      const auto cell = cell_of(slot);
      if (!cell) continue;
      LayerTypes& types = map[entry.name];
      if (cell->scheme()) types.weights = cell->scheme()->qtype.name;
      if (const auto activations = activations_of(entry, *cell)) {
        types.activations = activations->name;
      }
    }
  }
  return map;
}

}  // namespace quantal
