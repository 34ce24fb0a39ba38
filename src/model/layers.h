#pragma once

#include <memory>
#include <optional>
#include <string>

#include "model/modules.h"
#include "tensor/qtensor_impl.h"

namespace quantal {

/// The cell of a slot that holds a quantized weight or carries a layer's activations, else null.
inline std::shared_ptr<WeightCell> cell_of(const Slot& slot) {
  return is_weight(slot.tensor) ? impl_of(slot.tensor)->weight : nullptr;
}
inline bool has_codes(const Slot& slot) {
  const auto cell = cell_of(slot);
  return cell && cell->scheme();
}

/// The activations of `entry` among those that carry `cell`: layers of several kinds may share it.
inline std::optional<QType> activations_of(const ModuleEntry& entry, const WeightCell& cell) {
  if (!cell.layer || entry.kind == ModuleKind::kWeighted) return std::nullopt;
  return cell.layer->activations;
}

/// A layer's name: its module's, with the parameter's where the module has several weights.
std::string layer_name(const ModuleEntry& entry, const Slot& slot);

/// 10·log10(Σw² / Σ(w − ŵ)²) of a live weight; of a frozen one as noted when it was frozen.
std::optional<double> weight_snr_db(const at::Tensor& weight);

/// Whether something besides the model, whose `handles` to it are known, holds a float weight that
/// is to be replaced: an optimizer that was made before would go on stepping it.
bool is_held_outside(const at::Tensor& weight, size_t handles);

/// The layer state for a weight of `entry`, without scales.
std::shared_ptr<LayerState> new_layer(const ModuleEntry& entry, const Slot& slot,
                                      std::optional<QType> activations);

}  // namespace quantal
