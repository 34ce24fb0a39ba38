#include <quantal/calibration.h>

#include <torch/torch.h>

#include <exception>
#include <iostream>
#include <set>

#include "model/layers.h"

namespace quantal {

struct Calibration::State {
  CalibrationOptions options;
  std::vector<std::pair<std::shared_ptr<LayerState>, at::Device>> layers;
  int exceptions = std::uncaught_exceptions();
};

namespace {

void debug_line(const LayerState& layer, const LayerObserver& observer) {
  const auto range = [](const RangeStatistics& edge) {
    return edge.absmax ? std::to_string(*edge.absmax) : std::string("nothing");
  };
  std::clog << "calibrated " << layer.name << ": input " << range(observer.input) << " over "
            << observer.input.batches << " batches (" << observer.input.skipped
            << " left out), output " << range(observer.output)
            << (layer.quantize_output ? ", quantized\n" : ", float\n");
}

}  // namespace

Calibration::Calibration(const Model& model, const CalibrationOptions& options)
    : state_(std::make_unique<State>()) {
  TORCH_CHECK_VALUE(options.momentum >= 0 && options.momentum < 1,
                    "[quantal::Calibration] expected momentum in [0, 1), got ", options.momentum);
  state_->options = options;
  std::set<const LayerState*> seen;
  for (const ModuleEntry& entry : modules_of(model)) {
    for (const Slot& slot : entry.slots) {
      const auto cell = cell_of(slot);
      if (!cell || !cell->layer || !cell->layer->activations) continue;
      if (!seen.insert(cell->layer.get()).second) continue;
      TORCH_CHECK_VALUE(!cell->layer->observer, "[quantal::Calibration] '", entry.name,
                        "' is being calibrated already");
      state_->layers.emplace_back(cell->layer, cell->device());
    }
  }
  TORCH_CHECK_VALUE(!state_->layers.empty(),
                    "[quantal::Calibration] no layer of the model "
                    "quantizes activations: quantize(model, {.activations = …}) first");
  for (auto& [layer, device] : state_->layers) {
    layer->observer = std::make_shared<LayerObserver>();
    layer->observer->momentum = options.momentum;
  }
}

Calibration::~Calibration() {
  const bool unwinding = std::uncaught_exceptions() > state_->exceptions;
  for (auto& [layer, device] : state_->layers) {
    const auto observer = std::exchange(layer->observer, nullptr);
    if (unwinding) continue;
    const QType& qtype = *layer->activations;
    if (observer->input.absmax) layer->input_scale = observer->input.scale(qtype, device);
    if (observer->output.absmax) {
      layer->output_scale = observer->output.scale(qtype, device);
      layer->quantize_output = !state_->options.streamline || observer->consumed_quantized;
    }
    if (state_->options.debug) debug_line(*layer, *observer);
  }
}

}  // namespace quantal
