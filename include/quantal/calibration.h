#pragma once

#include <memory>

#include <quantal/api.h>
#include <quantal/model.h>

namespace quantal {

struct CalibrationOptions {
  /// Weight of the past in the moving average of each range: new = m·old + (1 − m)·batch.
  double momentum = 0.9;
  /// Quantize only outputs that a layer with quantized inputs takes; else every output.
  bool streamline = true;
  /// Write one line a layer to std::clog at the end.
  bool debug = false;
};

/// While it lives, forward passes of `model` run on float activations and their ranges are
/// recorded; when it goes, every layer that saw data gets its scales. Scoped to the model: others
/// run meanwhile as they are. Leaving by an exception leaves the model as it was. Batches with NaN
/// or Inf, or all zero, are left out.
///
/// Must not begin or end while another thread runs the model.
class QUANTAL_API Calibration {
 public:
  /// ValueError where no layer of `model` quantizes activations, or one is being calibrated, or
  /// momentum is not in [0, 1).
  explicit Calibration(const Model& model, const CalibrationOptions& options = {});
  ~Calibration();
  Calibration(const Calibration&) = delete;
  Calibration& operator=(const Calibration&) = delete;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace quantal
