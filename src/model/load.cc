#include <quantal/checkpoint.h>

#include <torch/torch.h>

#include <functional>
#include <map>

#include "model/checkpoint_file.h"
#include "model/checkpoint_map.h"
#include "model/foreign_checkpoint.h"
#include "model/layers.h"
#include "model/tensor_bytes.h"
#include "tensor/weights.h"

namespace quantal {
namespace {

enum class Loads { kIntoSameForm, kIntoFloat };

std::string listed(const std::vector<std::string>& keys) {
  constexpr size_t kShown = 10;
  std::string text;
  for (size_t i = 0; i < keys.size() && i < kShown; ++i) text += (i ? ", '" : "'") + keys[i] + "'";
  if (keys.size() > kShown) text += " and " + std::to_string(keys.size() - kShown) + " more";
  return text;
}

// Checks a whole file against a whole model first, then changes the model in steps that cannot
// fail.
class Loading {
 public:
  Loading(const Model& model, const std::string& path, Loads loads)
      : file_(path),
        loads_(loads),
        ours_(checkpoint_map(file_.metadata(), path)),
        modules_(modules_of(model)) {
    if (!ours_) foreign_ = foreign_map(file_.metadata(), path);
    for (const ModuleEntry& entry : modules_) {
      for (const Slot& slot : entry.slots) {
        names_[slot.tensor.unsafeGetTensorImpl()].push_back(entry.key(slot));
        handles_[slot.tensor.unsafeGetTensorImpl()] += static_cast<size_t>(slot.handles) + 1;
      }
    }
  }

  void run() {
    check_map_names();
    for (const ModuleEntry& entry : modules_) {
      for (const Slot& slot : entry.slots) plan(entry, slot);
    }
    check(missing_.empty(), "expected tensors ", listed(missing_), " of the model, got none");
    const auto left = file_.left_over();
    check(left.empty(), "the model has no place for the tensors ", listed(left));
    for (const auto& step : steps_) step();
  }

 private:
  template <typename... Parts>
  void check(bool holds, const Parts&... parts) const {
    TORCH_CHECK_VALUE(holds, "[quantal::load] '", file_.path(), "': ", parts...);
  }

  void check_map_names() const {
    std::vector<std::string> unknown;
    const auto note_unknown = [&](const std::string& name, bool known) {
      if (!known) unknown.push_back(name);
    };
    std::set<std::string> modules, keys;
    for (const ModuleEntry& entry : modules_) {
      modules.insert(entry.name);
      for (const Slot& slot : entry.slots) keys.insert(entry.key(slot));
    }
    if (foreign_) {
      for (const auto& [name, types] : *foreign_) note_unknown(name, modules.contains(name));
    }
    if (ours_) {
      for (const auto& [key, record] : ours_->weights) note_unknown(key, keys.contains(key));
      for (const auto& [key, target] : ours_->aliases) note_unknown(key, keys.contains(key));
    }
    check(unknown.empty(), "its quantization map names ", listed(unknown),
          ", which the model does not have");
  }

  bool holds(const std::string& key) const {
    return file_.has(key) || file_.has(part_keys(key, false).data) ||
           file_.has(part_keys(key, true).data) || (ours_ && ours_->weights.contains(key));
  }

  // Where a slot's tensor is in the file. Shared tensors are there once.
  std::string stored_key(const std::string& key, const Slot& slot) const {
    if (ours_) {
      if (const auto alias = ours_->aliases.find(key); alias != ours_->aliases.end()) {
        return alias->second;
      }
    }
    if (holds(key)) return key;
    for (const std::string& other : names_.at(slot.tensor.unsafeGetTensorImpl())) {
      if (holds(other)) return other;
    }
    return key;
  }

  void plan(const ModuleEntry& entry, const Slot& slot) {
    const std::string own_key = entry.key(slot);
    check(!slot.tensor.is_meta(), "the model's '", own_key,
          "' is on the meta device and has no "
          "memory to load into");
    const std::string key = stored_key(own_key, slot);
    const auto record = record_of(entry, slot, key);
    if (!record) return plan_plain(slot, key);
    check_record(entry, slot, key, *record);
    if (record->weights && !record->live) return plan_frozen(entry, slot, key, *record);
    plan_latent(entry, slot, key, *record);
  }

  std::optional<WeightRecord> record_of(const ModuleEntry& entry, const Slot& slot,
                                        const std::string& key) const {
    if (!ours_) return foreign_record(file_, foreign_, entry, slot, key);
    const auto found = ours_->weights.find(key);
    return found != ours_->weights.end() ? std::optional(found->second) : std::nullopt;
  }

  // The slot must be able to become what the record says.
  void check_record(const ModuleEntry& entry, const Slot& slot, const std::string& key,
                    const WeightRecord& record) const {
    const char* dtype = safetensors::dtype_name(file_dtype(slot.tensor.scalar_type(), key));
    check(slot.tensor.sizes() == at::IntArrayRef(record.shape), "tensor '", key, "' has shape ",
          at::IntArrayRef(record.shape), ", the model wants ", slot.tensor.sizes());
    check(record.dtype == dtype, "tensor '", key, "' has dtype ", record.dtype,
          ", the model wants ", dtype);
    const auto cell = cell_of(slot);
    if (!cell) {
      check(slot.quantizable, "tensor '", key, "' is quantized, and quantal cannot quantize ",
            entry.type, " '", entry.name, "'");
      check(loads_ == Loads::kIntoFloat, "tensor '", key,
            "' is quantized, the model's is not: quantize it the same way, or use requantize()");
      return;
    }
    const auto& scheme = cell->scheme();
    const bool same_weights =
        scheme.has_value() == record.weights.has_value() &&
        (!scheme || (scheme->qtype == *record.weights && scheme->group_size == record.group_size));
    const auto activations = cell->layer ? cell->layer->activations : std::nullopt;
    check(same_weights && activations == record.activations, "tensor '", key, "' is quantized as ",
          record.weights ? record.weights->name : "none", " with group size ", record.group_size,
          " and activations ", record.activations ? record.activations->name : "none",
          ", the model's in another way");
    check(cell->live() || !record.live, "tensor '", key,
          "' is not frozen, the model's is: load it into one that is not frozen");
    check(!cell->layer || !cell->layer->observer, "the model's '", key, "' is being calibrated");
  }

  void plan_plain(const Slot& slot, const std::string& key) {
    if (!file_.has(key)) return missing_.push_back(key);
    check(!has_codes(slot), "tensor '", key, "' is float, the model's is quantized");
    const at::Tensor value = checked_value(slot, key);
    if (share_with_first(slot, key)) return;
    steps_.push_back([target = slot.tensor, value] {
      at::NoGradGuard no_grad;
      target.copy_(value);
    });
  }

  at::Tensor checked_value(const Slot& slot, const std::string& key) {
    const at::Tensor value = file_.take(key);
    check(value.sizes() == slot.tensor.sizes(), "tensor '", key, "' has shape ", value.sizes(),
          ", the model wants ", slot.tensor.sizes());
    check(value.scalar_type() == slot.tensor.scalar_type(), "tensor '", key, "' has dtype ",
          value.scalar_type(), ", the model wants ", slot.tensor.scalar_type());
    // Two keys of the file for one tensor of the model: the second would overwrite the first.
    const auto [first, is_new] = sources_.try_emplace(slot.tensor.unsafeGetTensorImpl(), key);
    check(is_new || first->second == key || at::equal(file_.take(first->second), value),
          "tensors '", first->second, "' and '", key,
          "' differ, and the model has one tensor for both");
    return value;
  }

  // The file has one tensor for two slots: so has the model afterwards, where its module's own
  // handle is known. True where there is nothing left to do.
  bool share_with_first(const Slot& slot, const std::string& key) {
    const auto [first, is_new] = first_slots_.try_emplace(key, &slot);
    if (is_new) return false;
    if (first->second->tensor.is_same(slot.tensor)) return true;
    if (!slot.quantizable) return false;
    steps_.push_back([from = first->second->tensor, &slot] { slot.replace(from); });
    return true;
  }

  void plan_latent(const ModuleEntry& entry, const Slot& slot, const std::string& key,
                   const WeightRecord& record) {
    if (!file_.has(key)) return missing_.push_back(key);
    const at::Tensor value = checked_value(slot, key);
    std::optional<WeightScheme> scheme;
    if (record.weights) {
      scheme = {*record.weights, record.group_size, find_quantizer(record.quantizer)};
      check(scheme->quantizer != nullptr, "tensor '", key, "' is not frozen, and its quantizer '",
            record.quantizer, "' is not known");
    }
    const auto made = weights_.find(key);
    if (made != weights_.end()) return share_weight(entry, slot, key, record, made->second);
    const bool is_float = !cell_of(slot);
    check(
        !is_float || !is_held_outside(slot.tensor, handles_.at(slot.tensor.unsafeGetTensorImpl())),
        "something outside the model holds '", key,
        "'. An optimizer built before would go on "
        "stepping the float weight: build it afterwards");
    const at::Tensor live = is_float ? make_live_weight(slot.tensor, scheme) : slot.tensor;
    weights_[key] = live;
    steps_.push_back([live, value] {
      at::NoGradGuard no_grad;
      live.copy_(value);
    });
    share_weight(entry, slot, key, record, live);
  }

  void plan_frozen(const ModuleEntry& entry, const Slot& slot, const std::string& key,
                   const WeightRecord& record) {
    if (const auto made = weights_.find(key); made != weights_.end()) {
      return share_weight(entry, slot, key, record, made->second);
    }
    const PartKeys keys = part_keys(key, record.weights->is_affine());
    const at::Tensor data = part(keys.data), scale = part(keys.scale);
    const at::Tensor shift = keys.shift.empty() ? at::Tensor() : part(keys.shift);
    if (!data.defined() || !scale.defined() || (!keys.shift.empty() && !shift.defined())) return;
    const at::Device device = slot.tensor.device();
    const at::Tensor checked =
        weight_from_parts({*record.weights, record.group_size, data.to(device), scale.to(device),
                           shift.defined() ? shift.to(device) : shift},
                          record.shape, slot.tensor.scalar_type(), key);
    WeightScheme scheme{*record.weights, record.group_size, find_quantizer(record.quantizer)};
    if (!scheme.quantizer) scheme.quantizer = default_quantizer(scheme.qtype);
    auto cell = std::make_shared<WeightCell>(scheme, impl_of(checked)->weight->codes());
    weights_[key] = make_weight(std::move(cell), slot.tensor.scalar_type());
    share_weight(entry, slot, key, record, weights_[key]);
  }

  // Puts a weight in one of its slots. Its layer state is that of the first owner that computes
  // with activations, else of the first.
  void share_weight(const ModuleEntry& entry, const Slot& slot, const std::string& key,
                    const WeightRecord& record, const at::Tensor& weight) {
    if (!slot.tensor.is_same(weight)) steps_.push_back([&slot, weight] { slot.replace(weight); });
    const bool computes = entry.kind != ModuleKind::kWeighted;
    const auto [owner, is_first] = layer_owners_.try_emplace(key, computes);
    if (!is_first && (owner->second || !computes)) return;
    owner->second = computes;
    steps_.push_back([weight, layer = layer_from(entry, slot, record)] {
      impl_of(weight)->weight->layer = layer;
    });
  }

  // Undefined, and noted as missing, where the file has no such part.
  at::Tensor part(const std::string& key) {
    if (file_.has(key)) return file_.take(key);
    missing_.push_back(key);
    return {};
  }

  std::shared_ptr<LayerState> layer_from(const ModuleEntry& entry, const Slot& slot,
                                         const WeightRecord& record) {
    auto layer = new_layer(entry, slot, record.activations);
    layer->snr_db = record.snr_db;
    if (entry.kind == ModuleKind::kWeighted) return layer;
    layer->input_scale = scale(entry, slot, Edge::kInput, record.input_calibrated, record);
    layer->output_scale = scale(entry, slot, Edge::kOutput, record.output_calibrated, record);
    layer->quantize_output = record.quantize_output;
    return layer;
  }

  // Undefined where it was not calibrated; optimum-quanto marks that by a scale of 1.
  at::Tensor scale(const ModuleEntry& entry, const Slot& slot, Edge edge, bool is_calibrated,
                   const WeightRecord& record) {
    const std::string key = scale_key(entry, slot, edge);
    if (!file_.has(key)) {
      if (is_calibrated) missing_.push_back(key);
      return {};
    }
    const at::Tensor stored = file_.take(key);
    check(stored.numel() == 1 && at::isFloatingType(stored.scalar_type()), "expected '", key,
          "' to be one floating-point number, got shape ", stored.sizes(), " of ",
          stored.scalar_type());
    const double value = stored.item<double>();
    check(std::isfinite(value) && value > 0, "expected '", key,
          "' to be a finite positive scale, got ", value);
    check(ours_ || record.activations || value == 1, "'", key, "' is ", value,
          ", but nothing says what the activations are quantized to: a quantization map is needed");
    if (ours_ ? !is_calibrated : !record.activations || value == 1) return {};
    return stored.to(slot.tensor.device(), at::kFloat, /*non_blocking=*/false, /*copy=*/true)
        .reshape({});
  }

  CheckpointFile file_;
  const Loads loads_;
  std::optional<CheckpointMap> ours_;
  ForeignMap foreign_;
  std::vector<ModuleEntry> modules_;
  std::map<const c10::TensorImpl*, std::vector<std::string>> names_;
  std::map<const c10::TensorImpl*, size_t> handles_;
  std::map<const c10::TensorImpl*, std::string> sources_;  // of the model's tensors: their keys
  std::map<std::string, const Slot*> first_slots_;         // by key of the file
  std::map<std::string, at::Tensor> weights_;              // new quantized weights, by key
  std::map<std::string, bool> layer_owners_;               // by key: whether one computes
  std::vector<std::string> missing_;
  std::vector<std::function<void()>> steps_;
};

void load_as(const Model& model, const std::string& path, Loads loads) {
  c10::InferenceMode normal(false);
  at::NoGradGuard no_grad;
  Loading(model, path, loads).run();
}

}  // namespace

void requantize(const Model& model, const std::string& path) {
  load_as(model, path, Loads::kIntoFloat);
}

void load(const Model& model, const std::string& path) {
  load_as(model, path, Loads::kIntoSameForm);
}

}  // namespace quantal
