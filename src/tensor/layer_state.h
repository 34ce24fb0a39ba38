#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include <ATen/core/Tensor.h>

#include <quantal/qtype.h>

#include "ops/fake_quantize.h"

namespace quantal {

/// What calibration saw at one edge of a layer: an exponential moving average of max|x| over
/// batches. Batches with a NaN or Inf are counted and left out.
struct RangeStatistics {
  std::int64_t batches = 0;
  std::int64_t skipped = 0;
  std::optional<double> absmax;

  void update(const at::Tensor& value, double momentum);
  /// The scale that maps absmax to qmax, an fp32 scalar; undefined where nothing but zeros was
  /// seen.
  at::Tensor scale(const QType& qtype, at::Device device) const;
};

/// What a Calibration collects for one layer. Any thread may run the layer meanwhile.
struct LayerObserver {
  std::mutex mutex;
  double momentum = 0.9;
  RangeStatistics input;
  RangeStatistics output;
  bool consumed_quantized = false;  ///< a layer with quantized inputs took the output
};

/// What is known of one layer, its activations foremost. Travels with the layer's weight: what a
/// module hook would hold.
struct LayerState {
  std::string name;
  bool has_bias = false;
  bool quantizes_input = true;  ///< false where the kernel reads floats anyway (layer_norm)
  std::optional<QType> activations;
  at::Tensor input_scale;   ///< fp32 scalar; undefined: not calibrated, scales are dynamic
  at::Tensor output_scale;  ///< fp32 scalar; undefined: not calibrated
  bool quantize_output = false;
  std::optional<double> snr_db;             ///< of the weight, noted when it was frozen
  std::shared_ptr<LayerObserver> observer;  ///< set while a Calibration is alive
};

/// The layer's input as its kernel wants it: observed (while calibrating), quantized with the
/// calibrated scale, or fake-quantized with one scale a token. `layer` may be null: `x` as it is.
/// Differentiable, straight through.
at::Tensor prepare_input(const std::shared_ptr<LayerState>& layer, const at::Tensor& x,
                         TokenAxis axis);

/// The layer's output as the next operation gets it: observed, quantized or as it is.
/// `bias_follows`: the caller adds the bias in place afterwards, and quantization waits for that.
at::Tensor finish_output(const std::shared_ptr<LayerState>& layer, const at::Tensor& y,
                         bool bias_follows = false);

}  // namespace quantal
