#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include <ATen/core/Tensor.h>

#include <quantal/api.h>
#include <quantal/qtype.h>
#include <quantal/quantizer.h>

/// Quantized tensors. A quantized tensor is an ordinary `at::Tensor` of floating-point dtype, with
/// logical sizes and no storage, that holds codes and scales. Every ATen operation takes it:
/// linear, convolution, embedding and others run on the codes; all the rest see its float value
/// (counted by fallback_count()). A *weight* is frozen (codes only) or live (a float latent that
/// optimizers step and whose quantized value the compute operations read, with straight-through
/// gradients). An *activation* holds 8-bit codes and one scale.
///
/// Views are quantized as what they view. A write to a live weight or an activation, through any
/// view, is seen by all of them; a write to a frozen weight raises, except copy_() into the whole
/// of it. detach() and to() keep weights quantized; clone() of a part of a weight that is no range
/// of rows gives floats.
namespace quantal {

/// How quantize_weight() quantizes.
struct WeightOptions {
  QType qtype = qint8;
  /// Elements a group, of the flattened dimensions after the first. Unset: optimum-quanto's rule
  /// (qint2, qint4: 128, else 96, 64, 32, whichever divides the row; else the whole row).
  /// 0: the whole row. 8-bit types take 0 only.
  std::optional<std::int64_t> group_size = std::nullopt;
  /// Where group_size does not divide the row: a short last group instead of an error.
  bool allow_short_group = false;
  /// Unset: absmax for 8-bit types, max for qint2 and qint4.
  std::shared_ptr<const Quantizer> quantizer = nullptr;
};

/// The parts of a quantized weight or activation, in canonical form (docs/formats.md).
struct QuantizedParts {
  QType qtype = qint8;
  std::int64_t group_size = 0;
  at::Tensor data;
  at::Tensor scale;
  at::Tensor shift;  ///< undefined for symmetric types
};

/// True for quantized weights and activations.
QUANTAL_API bool is_quantized(const at::Tensor& tensor);
/// True for a quantized weight that has a float latent (unfrozen).
QUANTAL_API bool is_live(const at::Tensor& tensor);
/// True for a quantized weight that holds codes only.
QUANTAL_API bool is_frozen(const at::Tensor& tensor);

/// A frozen weight of the shape, dtype and device of `weight` (floating point, two dimensions or
/// more, finite: ValueError otherwise). Differentiable: gradients pass straight through.
QUANTAL_API at::Tensor quantize_weight(const at::Tensor& weight, const WeightOptions& options = {});

/// The same for a scale (and, for qint2 and qint4, a shift) that the caller chose: one value a
/// group, (rows · groups a row) in all, on the weight's device. Differentiable.
QUANTAL_API at::Tensor quantize_weight_with(const at::Tensor& weight, const at::Tensor& scale,
                                            const at::Tensor& shift, const QType& qtype,
                                            std::int64_t group_size = 0);

/// A live weight over `weight`'s own storage: a leaf that requires grad as `weight` did.
QUANTAL_API at::Tensor live_weight(const at::Tensor& weight, const WeightOptions& options = {});

/// Turns a live weight into a frozen one, in place: every handle to it sees codes. Nothing to do
/// on a frozen weight. ValueError where the latent is not finite.
QUANTAL_API void freeze(const at::Tensor& weight);

/// An activation: `codes = clamp(round(x / scale))` per tensor. `qtype` has 8 bits, `scale` is a
/// positive scalar tensor. Differentiable: gradients pass straight through.
QUANTAL_API at::Tensor quantize_activation(const at::Tensor& x, const QType& qtype,
                                           const at::Tensor& scale);

/// The float value: for live weights the quantized one. Plain tensors come back as they are.
/// Differentiable.
QUANTAL_API at::Tensor dequantize(const at::Tensor& tensor);

/// The float latent of a live weight (shares memory with it).
QUANTAL_API at::Tensor latent(const at::Tensor& weight);

/// Codes, scale and shift. Error where `tensor` is not quantized.
QUANTAL_API QuantizedParts parts(const at::Tensor& tensor);

/// A frozen weight of `sizes` over given parts, checked: shapes, dtypes, finite positive scales.
/// ValueError naming `name` otherwise.
QUANTAL_API at::Tensor weight_from_parts(const QuantizedParts& parts, at::IntArrayRef sizes,
                                         at::ScalarType dtype, const std::string& name = "weight");

/// How often an operation without its own kernel ran on dequantized values, in this process.
QUANTAL_API std::int64_t fallback_count();
/// The same by operator name ("aten::add.Tensor").
QUANTAL_API std::map<std::string, std::int64_t> fallback_counts();
QUANTAL_API void reset_fallback_counts();

/// Gives operators that libraries registered since start-up the fallback. Runs by itself whenever
/// a quantized tensor is made; returns how many operators it covers.
QUANTAL_API std::int64_t refresh_operators();

}  // namespace quantal
