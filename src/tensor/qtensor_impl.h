#pragma once

#include <memory>
#include <mutex>
#include <optional>

#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/TensorImpl.h>

#include "ops/weight_codes.h"
#include "quantizers/weight_scheme.h"
#include "tensor/layer_state.h"

namespace quantal {

/// What a weight is, shared by the weight and every alias of it (detach, t, row slices).
struct WeightCell {
  /// Unset: a float weight that only carries its layer's activations (LayerNorm).
  std::optional<WeightScheme> scheme;
  at::Tensor latent;  ///< defined: live
  std::shared_ptr<LayerState> layer;

  bool live() const { return latent.defined(); }
  /// The codes; those of a live weight are made anew when it changed. `outer_version`: the version
  /// of the handle that asks, which writes through views move and the latent's own does not.
  /// Precondition: scheme.
  std::shared_ptr<const WeightCodes> codes(std::uint32_t outer_version, bool versioned);
  void set_frozen(std::shared_ptr<const WeightCodes> codes);
  /// Gives a fresh live cell codes that stay valid until the latent is written.
  void seed_cache(std::shared_ptr<const WeightCodes> codes, std::uint32_t outer_version);

 private:
  std::mutex mutex_;
  std::shared_ptr<const WeightCodes> codes_;
  std::uint32_t cached_outer_ = 0;
  std::uint32_t cached_latent_ = 0;
  const void* cached_pointer_ = nullptr;
};

/// What a weight alias shows of its cell: rows [row_begin, row_begin + rows), maybe transposed.
struct WeightView {
  bool transposed = false;
  std::int64_t row_begin = 0;
  std::int64_t rows = -1;  ///< -1: all
};

/// What an activation is, shared by every alias of it. Each alias's own sizes, strides and storage
/// offset say which elements of `codes` (or, after a write that codes cannot hold, `value`) it shows.
struct ActivationCell {
  QType qtype = qint8;
  at::Tensor codes;  ///< undefined once materialized
  at::Tensor scale;  ///< fp32: a scalar, or one a token for operands inside a kernel
  at::Tensor value;  ///< the float value once materialized
  /// The layer whose calibrated output this is, while calibration watches who consumes it.
  std::shared_ptr<LayerState> traced;
  /// The layer whose bias is still to be added before the value is quantized.
  std::shared_ptr<LayerState> pending;
};

/// A tensor without storage that carries a weight or an activation.
struct QTensorImpl final : c10::TensorImpl {
  QTensorImpl(std::shared_ptr<WeightCell> weight, const WeightView& view, at::ScalarType dtype,
              at::Device device);
  QTensorImpl(std::shared_ptr<ActivationCell> activation, at::ScalarType dtype, at::Device device);

  std::shared_ptr<WeightCell> weight;
  std::shared_ptr<ActivationCell> activation;
  WeightView view;
  /// Version up to which writes to a frozen weight are accounted for.
  std::uint32_t accepted_version = 0;

  void set_geometry(at::IntArrayRef sizes, at::IntArrayRef strides, std::int64_t offset);
  c10::intrusive_ptr<QTensorImpl> shallow_copy() const;

  c10::intrusive_ptr<c10::TensorImpl> shallow_copy_and_detach(
      const c10::VariableVersion& version, bool allow_metadata_change) const override;
  c10::intrusive_ptr<c10::TensorImpl> shallow_copy_and_detach(
      c10::VariableVersion&& version, bool allow_metadata_change) const override;
  void shallow_copy_from(const c10::intrusive_ptr<c10::TensorImpl>& other) override;
  /// Ends the sentence of torch's storage errors ("Cannot access storage of …").
  const char* tensorimpl_type_name() const override;
};

inline bool is_qtensor(const at::Tensor& t) {
  return t.defined() && t.unsafeGetTensorImpl()->key_set().has_backend(
                            c10::BackendComponent::PrivateUse3Bit);
}
/// Precondition: is_qtensor(t).
inline QTensorImpl* impl_of(const at::Tensor& t) {
  return static_cast<QTensorImpl*>(t.unsafeGetTensorImpl());
}
inline bool is_weight(const at::Tensor& t) { return is_qtensor(t) && impl_of(t)->weight != nullptr; }
inline bool is_activation(const at::Tensor& t) {
  return is_qtensor(t) && impl_of(t)->activation != nullptr;
}

/// A view of a normal tensor is a normal tensor, also under InferenceMode: held while one is made.
class ViewGuard {
 public:
  explicit ViewGuard(const at::Tensor& base);

 private:
  std::optional<c10::InferenceMode> normal_;
};

/// A new weight tensor of `sizes` (contiguous) over `cell`.
at::Tensor make_weight(std::shared_ptr<WeightCell> cell, at::IntArrayRef sizes,
                       at::ScalarType dtype, at::Device device);
/// An alias of `base` that shows `view` of it; shares its version counter.
at::Tensor make_weight_alias(const at::Tensor& base, const WeightView& view, at::IntArrayRef sizes,
                             at::IntArrayRef strides);
/// A new activation with the geometry of `like`: the codes or the value of `cell`.
at::Tensor make_activation(std::shared_ptr<ActivationCell> cell, const at::Tensor& like,
                           at::ScalarType dtype);
/// An alias of the activation `base` that shows the elements `like` shows.
at::Tensor make_activation_alias(const at::Tensor& base, const at::Tensor& like);

/// The codes of a weight (all rows), checked against lost writes. Precondition: it has a scheme.
std::shared_ptr<const WeightCodes> weight_codes(const at::Tensor& weight);
/// The elements of the activation's codes that `t` shows. Precondition: not materialized.
at::Tensor activation_codes(const at::Tensor& t);

/// What compute operations read, as a plain tensor: the quantized value of weights, the value of
/// activations. Not differentiable.
at::Tensor quantized_value(const at::Tensor& t);
/// What every other operation reads: the latent of live weights, else the same.
at::Tensor float_value(const at::Tensor& t);
/// Replaces codes by their float value, for every alias: writes now go to that value.
void materialize(const at::Tensor& activation);

}  // namespace quantal
