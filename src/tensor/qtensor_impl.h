#pragma once

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/TensorImpl.h>

#include "tensor/layer_state.h"
#include "tensor/weight_cell.h"

namespace quantal {

struct BoundWeight;  // tensor/bound_weight.h

/// What an activation is, shared by every alias of it: `codes` or, after a write that codes cannot
/// hold, the float `value`, both flat. Each alias's sizes, strides and storage offset say which
/// elements it shows.
struct ActivationCell {
  QType qtype = qint8;
  at::Tensor codes;  ///< undefined once materialized
  at::Tensor scale;  ///< fp32 scalar
  at::Tensor value;  ///< the float value once materialized
  /// The layer whose calibrated output this is, while calibration watches who consumes it.
  std::shared_ptr<LayerState> traced;
  /// The layer whose bias is still to be added before the value is quantized.
  std::shared_ptr<LayerState> pending;
};

/// Sizes, strides and storage offset: which elements of a flat cell a tensor shows.
struct Geometry {
  std::vector<std::int64_t> sizes;
  std::vector<std::int64_t> strides;
  std::int64_t offset = 0;

  static Geometry of(const at::Tensor& t);
  static Geometry contiguous(at::IntArrayRef sizes);
  /// How many elements a flat tensor must have for this view of it.
  std::int64_t extent() const;
  at::Tensor view_of(const at::Tensor& flat) const {
    return flat.as_strided(sizes, strides, offset);
  }
  friend bool operator==(const Geometry&, const Geometry&) = default;
};

/// Rows [begin, begin + count) of a weight's cell, maybe transposed.
struct RowRange {
  bool transposed = false;
  std::int64_t begin = 0;
  std::int64_t count = 0;
};

/// A tensor without storage that carries a weight or an activation.
struct QTensorImpl final : c10::TensorImpl {
  QTensorImpl(std::shared_ptr<WeightCell> weight, const Geometry& geometry, at::ScalarType dtype);
  QTensorImpl(std::shared_ptr<ActivationCell> activation, const Geometry& geometry,
              at::ScalarType dtype);

  std::shared_ptr<WeightCell> weight;
  std::shared_ptr<ActivationCell> activation;
  /// Tells a 1 x 1 weight from its transpose.
  bool transposed = false;
  /// Of a weight that bind_weight() made; aliases have none.
  std::shared_ptr<const BoundWeight> bound;

  void set_geometry(const Geometry& geometry);
  c10::intrusive_ptr<QTensorImpl> shallow_copy() const;

  c10::intrusive_ptr<c10::TensorImpl> shallow_copy_and_detach(
      const c10::VariableVersion& version, bool allow_metadata_change) const override;
  c10::intrusive_ptr<c10::TensorImpl> shallow_copy_and_detach(
      c10::VariableVersion&& version, bool allow_metadata_change) const override;
  void shallow_copy_from(const c10::intrusive_ptr<c10::TensorImpl>& other) override;
  void release_resources() override;
  /// Ends the sentence of torch's storage errors ("Cannot access storage of …").
  const char* tensorimpl_type_name() const override;

 private:
  /// Makes torch's errors about storage and data pointers say what to do instead.
  void refuse_memory_access();
};

inline bool is_qtensor(const at::Tensor& t) {
  return t.defined() &&
         t.unsafeGetTensorImpl()->key_set().has_backend(c10::BackendComponent::PrivateUse3Bit);
}
/// Precondition: is_qtensor(t).
inline QTensorImpl* impl_of(const at::Tensor& t) {
  return static_cast<QTensorImpl*>(t.unsafeGetTensorImpl());
}
inline bool is_weight(const at::Tensor& t) { return is_qtensor(t) && impl_of(t)->weight; }
inline bool is_activation(const at::Tensor& t) { return is_qtensor(t) && impl_of(t)->activation; }

/// A view of a normal tensor is a normal tensor, also under InferenceMode: held while one is made.
class ViewGuard {
 public:
  explicit ViewGuard(const at::Tensor& base) {
    if (base.is_inference()) return;
    normal_.emplace(false);
    below_.emplace();
  }

 private:
  std::optional<c10::InferenceMode> normal_;
  std::optional<at::AutoDispatchBelowADInplaceOrView> below_;
};

/// A new weight tensor that shows all of `cell`.
at::Tensor make_weight(std::shared_ptr<WeightCell> cell, at::ScalarType dtype);
/// A new activation that shows `geometry` of `cell`.
at::Tensor make_activation(std::shared_ptr<ActivationCell> cell, const Geometry& geometry,
                           at::ScalarType dtype);
/// An activation over a dense float `value`, which it takes over.
at::Tensor make_float_activation(const at::Tensor& value, std::shared_ptr<LayerState> traced,
                                 std::shared_ptr<LayerState> pending);
/// An alias of `base` that shows `geometry` of its cell. Nothing for a live weight whose latent is
/// not contiguous, other than ranges of its rows.
std::optional<at::Tensor> make_alias(const at::Tensor& base, const Geometry& geometry);
/// `base`, a matrix, as its transpose.
at::Tensor make_transposed(const at::Tensor& base);

/// The rows that a weight shows; nothing where it is another view of its cell.
std::optional<RowRange> rows_of(const at::Tensor& weight);
/// A weight whose rows the CPU's kernels compute alone, with where they are.
struct PackedRows {
  std::shared_ptr<const PackedWeight> weight;
  RowRange rows;
};
/// Nothing where the kernels do not take the weight, or not the rows that it shows.
std::optional<PackedRows> packed_rows(const at::Tensor& weight);
/// True for a weight that shows all rows of its cell, not transposed.
bool shows_whole_cell(const at::Tensor& weight);
/// `full` (all rows of the weight's cell) as the alias `weight` shows it.
at::Tensor select_rows(const at::Tensor& full, const RowRange& rows);

/// The codes of a weight (all rows). Precondition: it has a scheme.
std::shared_ptr<const WeightCodes> weight_codes(const at::Tensor& weight);
/// The elements of the activation's codes that `t` shows. Precondition: not materialized.
at::Tensor activation_codes(const at::Tensor& t);

/// What compute operations read, as a plain tensor: the quantized value of weights, the value of
/// activations. Not differentiable.
at::Tensor quantized_value(const at::Tensor& t);
/// What every other operation reads: the latent of live weights, else the same.
at::Tensor float_value(const at::Tensor& t);
/// The latent as the live weight `t` shows it.
at::Tensor latent_of(const at::Tensor& t);
/// Replaces codes by their float value, for every alias: writes now go to that value.
void materialize(const at::Tensor& activation);

/// `tensor` with all of its storage as one dimension. Precondition: storage offset 0.
at::Tensor flat_storage(const at::Tensor& tensor);

}  // namespace quantal
