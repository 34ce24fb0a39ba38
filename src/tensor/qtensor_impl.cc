#include "tensor/qtensor_impl.h"

#include <ATen/ATen.h>

namespace quantal {
namespace {

std::optional<std::uint32_t> version_of(const at::Tensor& t) {
  if (t.is_inference()) return std::nullopt;
  return static_cast<std::uint32_t>(t._version());
}

// Reads geometry as rows of `sizes`, where it is that.
std::optional<RowRange> as_rows(const Geometry& geometry, at::IntArrayRef sizes) {
  if (geometry.sizes.size() != sizes.size() || sizes.empty()) return std::nullopt;
  const Geometry full = Geometry::contiguous(sizes);
  const std::int64_t row = full.strides[0];
  Geometry straight = geometry;
  RowRange rows;
  if (sizes.size() == 2 && geometry.strides != full.strides) {
    std::swap(straight.sizes[0], straight.sizes[1]);
    std::swap(straight.strides[0], straight.strides[1]);
    rows.transposed = true;
  }
  if (straight.strides != full.strides || row == 0 || straight.offset % row != 0) {
    return std::nullopt;
  }
  for (size_t i = 1; i < sizes.size(); ++i) {
    if (straight.sizes[i] != sizes[i]) return std::nullopt;
  }
  rows.begin = straight.offset / row;
  rows.count = straight.sizes[0];
  if (rows.begin + rows.count > sizes[0]) return std::nullopt;
  return rows;
}

}  // namespace

WeightCell::WeightCell(std::optional<WeightScheme> scheme, at::Tensor latent)
    : scheme_(std::move(scheme)), latent_(std::move(latent)) {}

WeightCell::WeightCell(std::optional<WeightScheme> scheme, std::shared_ptr<const WeightCodes> codes)
    : scheme_(std::move(scheme)), codes_(std::move(codes)) {}

at::IntArrayRef WeightCell::sizes() const {
  return live() ? latent_.sizes() : at::IntArrayRef(codes_->sizes);
}

at::Device WeightCell::device() const { return live() ? latent_.device() : codes_->data.device(); }

WeightCell::CacheKey WeightCell::cache_key(std::uint32_t outer_version) const {
  return {outer_version, latent_._version(), latent_.const_data_ptr()};
}

std::shared_ptr<const WeightCodes> WeightCell::codes(std::optional<std::uint32_t> outer_version) {
  std::lock_guard lock(mutex_);
  if (!live()) return codes_;
  if (outer_version && codes_ && cached_for_ == cache_key(*outer_version)) return codes_;
  // The cache outlives an InferenceMode in which it is filled.
  c10::InferenceMode normal(false);
  at::AutoDispatchBelowADInplaceOrView below;
  auto fresh = std::make_shared<const WeightCodes>(quantize(latent_, *scheme_));
  if (!outer_version) return fresh;
  cached_for_ = cache_key(*outer_version);
  return codes_ = std::move(fresh);
}

void WeightCell::set_codes(std::shared_ptr<const WeightCodes> codes) {
  std::lock_guard lock(mutex_);
  codes_ = std::move(codes);
  latent_ = at::Tensor();
  cached_for_.reset();
}

void WeightCell::seed_cache(std::shared_ptr<const WeightCodes> codes, std::uint32_t outer_version) {
  std::lock_guard lock(mutex_);
  codes_ = std::move(codes);
  cached_for_ = cache_key(outer_version);
}

Geometry Geometry::of(const at::Tensor& t) {
  return {t.sizes().vec(), t.strides().vec(), t.storage_offset()};
}

Geometry Geometry::contiguous(at::IntArrayRef sizes) {
  return {sizes.vec(), at::IntArrayRef(c10::contiguous_strides(sizes)).vec(), 0};
}

std::int64_t Geometry::extent() const {
  std::int64_t last = offset;
  for (size_t i = 0; i < sizes.size(); ++i) {
    last += std::max<std::int64_t>(sizes[i] - 1, 0) * strides[i];
  }
  return last + 1;
}

QTensorImpl::QTensorImpl(std::shared_ptr<WeightCell> cell, const Geometry& geometry,
                         at::ScalarType dtype)
    : c10::TensorImpl(c10::DispatchKeySet(c10::DispatchKey::PrivateUse3),
                      at::scalarTypeToTypeMeta(dtype), cell->device()),
      weight(std::move(cell)) {
  set_storage_access_should_throw();
  set_geometry(geometry);
  if (!weight->live()) accepted_version = 0;
}

QTensorImpl::QTensorImpl(std::shared_ptr<ActivationCell> cell, const Geometry& geometry,
                         at::ScalarType dtype)
    : c10::TensorImpl(c10::DispatchKeySet(c10::DispatchKey::PrivateUse3),
                      at::scalarTypeToTypeMeta(dtype),
                      (cell->codes.defined() ? cell->codes : cell->value).device()),
      activation(std::move(cell)) {
  set_storage_access_should_throw();
  set_geometry(geometry);
}

void QTensorImpl::set_geometry(const Geometry& geometry) {
  set_sizes_and_strides(geometry.sizes, geometry.strides, geometry.offset);
}

c10::intrusive_ptr<QTensorImpl> QTensorImpl::shallow_copy() const {
  const at::ScalarType dtype = c10::typeMetaToScalarType(this->dtype());
  const Geometry geometry{sizes().vec(), strides().vec(), storage_offset()};
  auto copy = weight ? c10::make_intrusive<QTensorImpl>(weight, geometry, dtype)
                     : c10::make_intrusive<QTensorImpl>(activation, geometry, dtype);
  copy->accepted_version = accepted_version.load();
  return copy;
}

c10::intrusive_ptr<c10::TensorImpl> QTensorImpl::shallow_copy_and_detach(
    const c10::VariableVersion& version, bool allow_metadata_change) const {
  auto copy = shallow_copy();
  copy_tensor_metadata(this, copy.get(), version, allow_metadata_change);
  copy->refresh_numel();
  if (version.enabled()) copy->accepted_version = version.current_version();
  return copy;
}

c10::intrusive_ptr<c10::TensorImpl> QTensorImpl::shallow_copy_and_detach(
    c10::VariableVersion&& version, bool allow_metadata_change) const {
  return shallow_copy_and_detach(static_cast<const c10::VariableVersion&>(version),
                                 allow_metadata_change);
}

void QTensorImpl::shallow_copy_from(const c10::intrusive_ptr<c10::TensorImpl>& other) {
  auto* source = dynamic_cast<QTensorImpl*>(other.get());
  TORCH_CHECK(source, "[quantal] expected quantized data for a quantized tensor");
  weight = source->weight;
  activation = source->activation;
  copy_tensor_metadata(source, this, version_counter(), allow_tensor_metadata_change());
  accepted_version = is_inference() ? -1 : static_cast<std::int64_t>(version_counter().current_version());
  if (!weight || weight->live()) return;
  // This is how Module::to(dtype) changes a weight for good: its scales follow where they can.
  const auto codes = weight->codes(std::nullopt);
  const at::ScalarType dtype = c10::typeMetaToScalarType(this->dtype());
  if (codes->scale.scalar_type() == dtype) return;
  auto cell = std::make_shared<WeightCell>(
      weight->scheme(), std::make_shared<const WeightCodes>(round_scales(*codes, dtype)));
  cell->layer = weight->layer;
  weight = std::move(cell);
}

void QTensorImpl::release_resources() {
  weight.reset();
  activation.reset();
  c10::TensorImpl::release_resources();
}

const char* QTensorImpl::tensorimpl_type_name() const {
  return "a quantized tensor (use quantal::save, or quantal::dequantize() first)";
}

at::Tensor make_weight(std::shared_ptr<WeightCell> cell, at::ScalarType dtype) {
  const Geometry geometry = Geometry::contiguous(cell->sizes());
  return at::detail::make_tensor<QTensorImpl>(std::move(cell), geometry, dtype);
}

at::Tensor make_activation(std::shared_ptr<ActivationCell> cell, const Geometry& geometry,
                           at::ScalarType dtype) {
  return at::detail::make_tensor<QTensorImpl>(std::move(cell), geometry, dtype);
}

at::Tensor make_float_activation(const at::Tensor& value, std::shared_ptr<LayerState> traced,
                                 std::shared_ptr<LayerState> pending) {
  const bool whole = value.is_non_overlapping_and_dense() && value.storage_offset() == 0;
  const at::Tensor dense = whole ? value : value.contiguous().clone();
  auto cell = std::make_shared<ActivationCell>();
  cell->value = flat_storage(dense);
  cell->traced = std::move(traced);
  cell->pending = std::move(pending);
  return make_activation(std::move(cell), Geometry::of(dense), dense.scalar_type());
}

std::optional<at::Tensor> make_alias(const at::Tensor& base, const Geometry& geometry) {
  QTensorImpl* impl = impl_of(base);
  if (impl->weight && !as_rows(geometry, impl->weight->sizes())) return std::nullopt;
  if (impl->activation && c10::multiply_integers(geometry.sizes) > 0) {
    const ActivationCell& cell = *impl->activation;
    const std::int64_t length = (cell.codes.defined() ? cell.codes : cell.value).numel();
    TORCH_CHECK(geometry.extent() <= length, "[quantal] a view of sizes ", geometry.sizes,
                ", strides ", geometry.strides, " and offset ", geometry.offset,
                " is out of bounds for an activation of ", length, " elements");
  }
  ViewGuard guard(base);
  auto alias = impl->shallow_copy();
  alias->set_geometry(geometry);
  return at::Tensor(std::move(alias));
}

RowRange rows_of(const at::Tensor& weight) {
  const auto rows = as_rows(Geometry::of(weight), impl_of(weight)->weight->sizes());
  if (rows) return *rows;
  // Only shapes without elements get here: every alias was made from a row range.
  return {weight.sizes() != impl_of(weight)->weight->sizes(), 0,
          impl_of(weight)->weight->sizes()[0]};
}

at::Tensor select_rows(const at::Tensor& full, const RowRange& rows) {
  at::Tensor part = full;
  if (rows.count != full.size(0)) part = part.narrow(0, rows.begin, rows.count);
  return rows.transposed ? part.t() : part;
}

std::shared_ptr<const WeightCodes> weight_codes(const at::Tensor& weight) {
  QTensorImpl* impl = impl_of(weight);
  const auto version = version_of(weight);
  if (!impl->weight->live() && version) {
    std::int64_t accepted = impl->accepted_version;
    if (accepted < 0) impl->accepted_version = accepted = *version;
    TORCH_CHECK(accepted == *version,
                "[quantal] a view of a frozen weight of shape ", weight.sizes(),
                " was written; frozen weights hold codes that such a write cannot change. "
                "Use copy_(), or write before freeze()");
  }
  return impl->weight->codes(version);
}

at::Tensor activation_codes(const at::Tensor& t) {
  return Geometry::of(t).view_of(impl_of(t)->activation->codes);
}

at::Tensor quantized_value(const at::Tensor& t) {
  const QTensorImpl* impl = impl_of(t);
  if (impl->activation) {
    const ActivationCell& cell = *impl->activation;
    if (!cell.codes.defined()) return Geometry::of(t).view_of(cell.value).to(t.scalar_type());
    return activation_codes(t).to(at::kFloat).mul_(cell.scale).to(t.scalar_type());
  }
  if (!impl->weight->scheme()) return float_value(t);
  const auto codes = weight_codes(t);
  return select_rows(decode_weight(*codes, t.scalar_type()), rows_of(t));
}

at::Tensor float_value(const at::Tensor& t) {
  const QTensorImpl* impl = impl_of(t);
  if (impl->weight && impl->weight->live()) {
    return select_rows(impl->weight->latent().alias(), rows_of(t));
  }
  return quantized_value(t);
}

void materialize(const at::Tensor& activation) {
  ActivationCell& cell = *impl_of(activation)->activation;
  if (!cell.codes.defined()) return;
  c10::InferenceMode mode(activation.is_inference());
  at::AutoDispatchBelowADInplaceOrView below;
  cell.value = cell.codes.to(at::kFloat).mul_(cell.scale).to(activation.scalar_type());
  cell.codes = at::Tensor();
}

at::Tensor flat_storage(const at::Tensor& tensor) {
  const auto bytes = static_cast<std::int64_t>(tensor.storage().nbytes());
  return tensor.as_strided({bytes / tensor.element_size()}, {1}, 0);
}

}  // namespace quantal
