#include <quantal/checkpoint.h>
#include <quantal/qtensor.h>

#include <torch/torch.h>

#include <map>
#include <set>

#include "model/checkpoint_map.h"
#include "model/layers.h"
#include "model/tensor_bytes.h"

namespace quantal {
namespace {

// Collects the tensors and the records of a file.
class Saving {
 public:
  void add(const ModuleEntry& entry, const Slot& slot) {
    const std::string key = entry.key(slot);
    const auto cell = cell_of(slot);
    const auto [first, is_new] = written_.try_emplace(slot.tensor.unsafeGetTensorImpl(), key);
    if (!is_new) {
      map_.aliases[key] = first->second;
    } else if (cell) {
      check_whole(key, slot.tensor, *cell);
      add_weight(key, slot.tensor, *cell);
    } else {
      add_tensor(key, slot.tensor);
    }
    // Of all that share a weight, the first that computes with activations names the scales.
    if (!cell || !cell->layer || entry.kind == ModuleKind::kWeighted) return;
    if (!scaled_.insert(cell.get()).second) return;
    add_scale(scale_key(entry, slot, Edge::kInput), cell->layer->input_scale);
    add_scale(scale_key(entry, slot, Edge::kOutput), cell->layer->output_scale);
  }

  void write(const std::string& path, const std::map<std::string, LayerTypes>& layers) const {
    raise_unless_ok(safetensors::write(path, views_, to_metadata(map_, layers)));
  }

 private:
  static void check_whole(const std::string& key, const at::Tensor& tensor,
                          const WeightCell& cell) {
    TORCH_CHECK_VALUE(tensor.sizes() == cell.sizes(), "[quantal::save] '", key,
                      "': expected a whole weight of shape ", cell.sizes(),
                      ", got a part of shape ", tensor.sizes());
  }

  void add_weight(const std::string& key, const at::Tensor& tensor, WeightCell& cell) {
    WeightRecord record;
    record.shape = tensor.sizes().vec();
    record.dtype = safetensors::dtype_name(file_dtype(tensor.scalar_type(), key));
    record.live = cell.live();
    if (const auto& scheme = cell.scheme()) {
      record.weights = scheme->qtype;
      record.group_size = scheme->group_size;
      record.quantizer = scheme->quantizer->name();
      TORCH_CHECK_VALUE(!record.live || find_quantizer(record.quantizer), "[quantal::save] '", key,
                        "' is not frozen and its quantizer '", record.quantizer,
                        "' cannot be named in a file: freeze() first");
    }
    if (const auto& layer = cell.layer) {
      record.activations = layer->activations;
      record.snr_db = record.live ? std::nullopt : layer->snr_db;
      record.input_calibrated = layer->input_scale.defined();
      record.output_calibrated = layer->output_scale.defined();
      record.quantize_output = layer->quantize_output;
    }
    map_.weights[key] = record;
    if (cell.live()) return add_tensor(key, cell.latent());
    const QuantizedParts found = parts(tensor);
    const PartKeys keys = part_keys(key, found.qtype.is_affine());
    add_tensor(keys.data, found.data);
    add_tensor(keys.scale, found.scale);
    if (found.shift.defined()) add_tensor(keys.shift, found.shift);
  }

  // optimum-quanto has both scales of every layer, and 1 where nothing was calibrated.
  void add_scale(const std::string& key, const at::Tensor& scale) {
    add_tensor(key, scale.defined() ? scale : at::ones({}, at::kFloat));
  }

  void add_tensor(const std::string& key, const at::Tensor& tensor) {
    TORCH_CHECK_VALUE(tensor.layout() == at::kStrided && !tensor.is_meta(), "[quantal::save] '",
                      key, "': expected a dense tensor with data, got layout ", tensor.layout(),
                      " on device ", tensor.device());
    const at::Tensor data = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous();
    kept_.push_back(data);
    views_.push_back({key,
                      file_dtype(data.scalar_type(), key),
                      {data.sizes().begin(), data.sizes().end()},
                      data.numel() > 0 ? data.const_data_ptr() : nullptr,
                      data.nbytes()});
  }

  CheckpointMap map_;
  std::map<const c10::TensorImpl*, std::string> written_;
  std::set<const WeightCell*> scaled_;
  std::vector<at::Tensor> kept_;
  std::vector<safetensors::TensorView> views_;
};

}  // namespace

void save(const Model& model, const std::string& path) {
  at::NoGradGuard no_grad;
  Saving saving;
  for (const ModuleEntry& entry : modules_of(model)) {
    for (const Slot& slot : entry.slots) saving.add(entry, slot);
  }
  saving.write(path, quantization_map(model));
}

}  // namespace quantal
