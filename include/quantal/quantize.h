#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <quantal/api.h>
#include <quantal/model.h>
#include <quantal/qtype.h>
#include <quantal/quantizer.h>
#include <quantal/report.h>

namespace torch::optim {
class Optimizer;
}  // namespace torch::optim

/// Quantizing the layers of a model in place.
namespace quantal {

struct QuantizeOptions {
  /// Unset: weights stay float (for quantizing activations alone).
  std::optional<QType> weights = std::nullopt;
  /// qint8 or float8. Static once a Calibration ran, dynamic (one scale a token) until then.
  std::optional<QType> activations = std::nullopt;
  /// Unset: absmax for 8-bit weights, max for qint2 and qint4.
  std::shared_ptr<const Quantizer> quantizer = nullptr;
  /// Shell-style patterns (fnmatch) over module names ("encoder.*.linear1"). Empty: every module.
  std::vector<std::string> include = {};
  std::vector<std::string> exclude = {};
  /// See WeightOptions.
  std::optional<std::int64_t> group_size = std::nullopt;
  bool allow_short_group = false;
  /// Quantize although something outside the model holds one of its weights.
  bool ignore_outside_handles = false;
};

/// Replaces the weights of every layer that quantal knows (README.md lists them) by live quantized
/// weights; the module's code stays as it is. Weights that modules share stay shared. Layers that
/// are already quantized just so stay as they are.
///
/// Returns what was done, and what was left alone and why.
/// ValueError, with the model as it was: a pattern that matches no layer, a non-finite weight, a
/// group size that does not fit, a layer already quantized otherwise, or a weight that something
/// outside the model holds: an optimizer made before would go on stepping the float weight.
QUANTAL_API Report quantize(const Model& model, const QuantizeOptions& options);

/// The same for a model that `optimizer` already trains: it steps the quantized weights from now on
/// and keeps its state.
QUANTAL_API Report quantize(const Model& model, const QuantizeOptions& options,
                            torch::optim::Optimizer& optimizer);

/// Packs live weights: codes and scales only from now on. Nothing to do where all are frozen.
/// ValueError, with the model as it was, where a weight is not finite.
QUANTAL_API void freeze(const Model& model);

/// How one layer is quantized, by optimum-quanto's names ("qint8", "none").
struct LayerTypes {
  std::string weights = "none";
  std::string activations = "none";
  friend bool operator==(const LayerTypes&, const LayerTypes&) = default;
};

/// Every quantized layer by module name.
QUANTAL_API std::map<std::string, LayerTypes> quantization_map(const Model& model);

}  // namespace quantal
