#pragma once

#include <memory>
#include <string_view>

#include <ATen/core/Tensor.h>

#include <quantal/api.h>
#include <quantal/qtype.h>

namespace quantal {

/// The scale, and for affine types the shift, of every group of a weight: shape (groups, 1).
struct ScaleShift {
  at::Tensor scale;
  at::Tensor shift;  ///< undefined for symmetric types
};

/// Chooses scale and shift of a weight: a pure function of its groups and the qtype.
class QUANTAL_API Quantizer {
 public:
  virtual ~Quantizer() = default;
  /// What a checkpoint notes: "absmax", "max", "hqq", …
  virtual std::string_view name() const = 0;
  virtual bool supports(const QType& qtype) const = 0;
  /// `groups`: (groups, group size) fp32 or fp64, finite. Returns tensors of the same dtype.
  /// Precondition: supports(qtype).
  virtual ScaleShift operator()(const at::Tensor& groups, const QType& qtype) const = 0;
};

/// Symmetric types: `scale = max|w| / qmax`. A group of zeros gets scale 1.
QUANTAL_API std::shared_ptr<const Quantizer> absmax_quantizer();

/// Affine types: `scale = (max - min) / (2^bits - 1)`, `shift = -min`.
QUANTAL_API std::shared_ptr<const Quantizer> max_quantizer();

/// Options of hqq_quantizer(); the defaults are optimum-quanto's.
struct HqqOptions {
  double lp_norm = 0.7;
  double beta = 10.0;
  double kappa = 1.01;
  int iterations = 20;
  friend bool operator==(const HqqOptions&, const HqqOptions&) = default;
};

/// Affine types: max_quantizer() with the shift refined by half-quadratic quantization (Badri and
/// Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023).
QUANTAL_API std::shared_ptr<const Quantizer> hqq_quantizer(const HqqOptions& options = {});

/// The quantizer whose name() is `name`, or null where quantal has none of that name.
QUANTAL_API std::shared_ptr<const Quantizer> find_quantizer(std::string_view name);

/// absmax for symmetric types, max for affine ones.
QUANTAL_API std::shared_ptr<const Quantizer> default_quantizer(const QType& qtype);

}  // namespace quantal
