#pragma once

#include <cstdint>
#include <iosfwd>
#include <optional>
#include <string>
#include <vector>

#include <quantal/api.h>
#include <quantal/model.h>
#include <quantal/qtype.h>

namespace quantal {

/// One weight of a model and what became of it.
struct LayerReport {
  std::string name;  ///< module name; with the parameter's where a module has several weights
  std::string kind;  ///< "Linear", "Conv2d", …
  std::optional<QType> weights;
  std::optional<QType> activations;
  std::int64_t group_size = 0;  ///< 0: one group a row
  bool frozen = false;
  std::int64_t bytes_before = 0;  ///< of the float weight
  std::int64_t bytes_after = 0;   ///< of codes, scales and shifts once frozen
  /// 10·log10(Σw² / Σ(w − ŵ)²); unset where the float weight is not known any more.
  std::optional<double> snr_db;
  std::optional<double> input_scale;   ///< unset: not calibrated
  std::optional<double> output_scale;  ///< unset: not calibrated
  bool quantizes_output = false;
  std::string left_alone;  ///< why nothing of it is quantized; empty where something is
};

/// Every layer of a model that has parameters, and totals over all parameters and buffers.
struct Report {
  std::vector<LayerReport> layers;
  std::int64_t bytes_before = 0;
  std::int64_t bytes_after = 0;
};

/// What is quantized in `model`, what is not and why.
QUANTAL_API Report report(const Model& model);

/// A table, one layer a line.
QUANTAL_API std::ostream& operator<<(std::ostream& out, const Report& report);

}  // namespace quantal
