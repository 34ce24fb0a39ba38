#include <quantal/report.h>

#include <torch/torch.h>

#include <algorithm>
#include <iomanip>
#include <ostream>
#include <set>
#include <sstream>

#include "model/layers.h"

namespace quantal {
namespace {

std::optional<double> item(const at::Tensor& scale) {
  return scale.defined() ? std::optional(scale.item<double>()) : std::nullopt;
}

std::int64_t float_bytes(const at::Tensor& t) { return t.numel() * t.element_size(); }

std::int64_t packed_bytes(const at::Tensor& t) {
  if (!is_weight(t) || !impl_of(t)->weight->scheme()) return float_bytes(t);
  return impl_of(t)->weight->nbytes();
}

LayerReport layer_report(const ModuleEntry& entry, const Slot& slot) {
  LayerReport report;
  report.name = layer_name(entry, slot);
  report.kind = entry.type;
  report.bytes_before = float_bytes(slot.tensor);
  report.bytes_after = packed_bytes(slot.tensor);
  const auto cell = cell_of(slot);
  if (!cell) {
    report.left_alone = entry.unsupported.empty() ? "not quantized" : entry.unsupported;
    return report;
  }
  if (cell->scheme()) {
    report.weights = cell->scheme()->qtype;
    report.group_size = cell->scheme()->group_size;
    report.frozen = !cell->live();
    report.snr_db = weight_snr_db(slot.tensor);
  }
  report.activations = activations_of(entry, *cell);
  if (report.activations) {
    report.input_scale = item(cell->layer->input_scale);
    report.output_scale = item(cell->layer->output_scale);
    report.quantizes_output = cell->layer->quantize_output;
  }
  return report;
}

std::string percent(std::int64_t after, std::int64_t before) {
  std::ostringstream text;
  text << std::fixed << std::setprecision(1)
       << (before > 0 ? 100.0 * static_cast<double>(after) / static_cast<double>(before) : 100.0)
       << " %";
  return text.str();
}

std::vector<std::string> cells_of(const LayerReport& layer) {
  std::ostringstream snr;
  if (layer.snr_db) snr << std::fixed << std::setprecision(1) << *layer.snr_db << " dB";
  std::string activations = layer.activations ? std::string(layer.activations->name) : "-";
  const ModuleType* type = find_module_type(layer.kind);
  const bool is_dynamic = type == nullptr || type->kind != ModuleKind::kNormalizing;
  if (layer.input_scale || layer.output_scale) {
    activations += " static";
  } else if (layer.activations && is_dynamic) {
    activations += " dynamic";
  }
  std::string state = layer.left_alone;
  if (state.empty()) state = !layer.weights ? "float weight" : layer.frozen ? "frozen" : "live";
  return {layer.name.empty() ? "(root)" : layer.name,
          layer.kind,
          layer.weights ? std::string(layer.weights->name) : "-",
          layer.group_size > 0 ? std::to_string(layer.group_size)
          : layer.weights      ? "row"
                               : "-",
          activations,
          std::to_string(layer.bytes_before),
          std::to_string(layer.bytes_after),
          snr.str().empty() ? "-" : snr.str(),
          state};
}

}  // namespace

std::string layer_name(const ModuleEntry& entry, const Slot& slot) {
  return slot.parameter == "weight" ? entry.name : entry.key(slot);
}

std::shared_ptr<LayerState> new_layer(const ModuleEntry& entry, const Slot& slot,
                                      std::optional<QType> activations) {
  auto layer = std::make_shared<LayerState>();
  layer->name = layer_name(entry, slot);
  layer->has_bias = slot.has_bias;
  layer->quantizes_input = entry.kind != ModuleKind::kNormalizing;
  layer->activations = activations;
  return layer;
}

std::optional<double> weight_snr_db(const at::Tensor& weight) {
  const auto& cell = impl_of(weight)->weight;
  if (!cell->live()) return cell->layer ? cell->layer->snr_db : std::nullopt;
  at::NoGradGuard no_grad;
  const at::Tensor exact = cell->latent().to(at::kDouble);
  const double noise =
      (quantized_value(weight).to(at::kDouble) - exact).square_().sum().item<double>();
  const double signal = exact.square().sum().item<double>();
  if (noise == 0 || signal == 0) return std::nullopt;
  return 10 * std::log10(signal / noise);
}

Report report(const Model& model) {
  Report result;
  std::set<const c10::TensorImpl*> counted;
  for (const ModuleEntry& entry : modules_of(model)) {
    LayerReport rest;
    rest.name = entry.name;
    rest.kind = entry.type;
    bool has_layers = false;
    for (const Slot& slot : entry.slots) {
      if (counted.insert(slot.tensor.unsafeGetTensorImpl()).second) {
        result.bytes_before += float_bytes(slot.tensor);
        result.bytes_after += packed_bytes(slot.tensor);
      }
      if (slot.quantizable || cell_of(slot)) {
        result.layers.push_back(layer_report(entry, slot));
        has_layers = true;
      } else if (!slot.is_buffer) {
        rest.bytes_before += float_bytes(slot.tensor);
      }
    }
    if (has_layers || rest.bytes_before == 0) continue;
    rest.bytes_after = rest.bytes_before;
    rest.left_alone = "no quantized kernel for its parameters";
    result.layers.push_back(std::move(rest));
  }
  return result;
}

std::ostream& operator<<(std::ostream& out, const Report& report) {
  std::vector<std::vector<std::string>> rows = {{"layer", "kind", "weights", "group", "activations",
                                                 "bytes before", "bytes after", "SNR", "state"}};
  for (const LayerReport& layer : report.layers) rows.push_back(cells_of(layer));
  std::vector<size_t> widths(rows[0].size(), 0);
  for (const auto& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  for (const auto& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) {
      out << (i > 0 ? "  " : "") << row[i];
      if (i + 1 < row.size()) out << std::string(widths[i] - row[i].size(), ' ');
    }
    out << "\n";
  }
  return out << "all parameters and buffers: " << report.bytes_before << " bytes before, "
             << report.bytes_after << " after (" << percent(report.bytes_after, report.bytes_before)
             << ")\n";
}

}  // namespace quantal
