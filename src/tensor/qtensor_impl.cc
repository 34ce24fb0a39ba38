#include "tensor/qtensor_impl.h"

#include <ATen/ATen.h>

#include "ops/cpu_kernels.h"
namespace quantal {
namespace {

// Reads geometry as rows of `sizes`, not transposed, where it is that.
std::optional<RowRange> as_straight_rows(const Geometry& geometry, at::IntArrayRef sizes) {
  const Geometry full = Geometry::contiguous(sizes);
  const std::int64_t row = full.strides[0];
  if (geometry.strides != full.strides || geometry.offset % row != 0) return std::nullopt;
  for (size_t i = 1; i < sizes.size(); ++i) {
    if (geometry.sizes[i] != sizes[i]) return std::nullopt;
  }
  const RowRange rows{false, geometry.offset / row, geometry.sizes[0]};
  if (rows.begin + rows.count > sizes[0]) return std::nullopt;
  return rows;
}

Geometry swapped(const Geometry& matrix) {
  return {
      {matrix.sizes[1], matrix.sizes[0]}, {matrix.strides[1], matrix.strides[0]}, matrix.offset};
}

// Reads geometry as rows of `sizes` where it is that. `transposed` decides where both readings fit:
// one row of one element.
std::optional<RowRange> as_rows(const Geometry& geometry, at::IntArrayRef sizes, bool transposed) {
  if (geometry.sizes.size() != sizes.size() || sizes.empty()) return std::nullopt;
  if (sizes.size() != 2) return as_straight_rows(geometry, sizes);
  for (const bool turned : {transposed, !transposed}) {
    auto rows = as_straight_rows(turned ? swapped(geometry) : geometry, sizes);
    if (!rows) continue;
    rows->transposed = turned;
    return rows;
  }
  return std::nullopt;
}

// The float value of the elements that `geometry` shows.
at::Tensor decode_view(WeightCell& cell, const Geometry& geometry, at::ScalarType dtype) {
  if (c10::multiply_integers(geometry.sizes) == 0) {
    return at::empty(geometry.sizes, at::dtype(dtype).device(cell.device()));
  }
  const std::int64_t row = c10::multiply_integers(cell.sizes().slice(1));
  const std::int64_t begin = geometry.offset / row;
  const std::int64_t end = (geometry.extent() - 1) / row + 1;
  const at::Tensor flat = cell.decode(begin, end - begin, dtype).contiguous().flatten();
  return flat.as_strided(geometry.sizes, geometry.strides,
                         flat.storage_offset() + geometry.offset - begin * row);
}

}  // namespace

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
  refuse_memory_access();
  set_geometry(geometry);
}

QTensorImpl::QTensorImpl(std::shared_ptr<ActivationCell> cell, const Geometry& geometry,
                         at::ScalarType dtype)
    : c10::TensorImpl(c10::DispatchKeySet(c10::DispatchKey::PrivateUse3),
                      at::scalarTypeToTypeMeta(dtype),
                      (cell->codes.defined() ? cell->codes : cell->value).device()),
      activation(std::move(cell)) {
  refuse_memory_access();
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
  copy->transposed = transposed;
  return copy;
}

c10::intrusive_ptr<c10::TensorImpl> QTensorImpl::shallow_copy_and_detach(
    const c10::VariableVersion& version, bool allow_metadata_change) const {
  auto copy = shallow_copy();
  copy_tensor_metadata(this, copy.get(), version, allow_metadata_change);
  copy->refresh_numel();
  return copy;
}

c10::intrusive_ptr<c10::TensorImpl> QTensorImpl::shallow_copy_and_detach(
    c10::VariableVersion&& version, bool allow_metadata_change) const {
  return shallow_copy_and_detach(static_cast<const c10::VariableVersion&>(version),
                                 allow_metadata_change);
}

void QTensorImpl::shallow_copy_from(const c10::intrusive_ptr<c10::TensorImpl>& other) {
  auto* source = dynamic_cast<QTensorImpl*>(other.get());
  if (!source) {
    // `weight.data = floats`: the latent takes the values.
    TORCH_CHECK(weight && weight->live(),
                "[quantal] expected quantized data for a quantized tensor");
    at::AutoDispatchBelowADInplaceOrView below;
    weight->latent().copy_(at::Tensor(other));
    weight->latent().unsafeGetTensorImpl()->bump_version();
    return;
  }
  weight = source->weight;
  activation = source->activation;
  bound = source->bound;
  transposed = source->transposed;
  copy_tensor_metadata(source, this, version_counter(), allow_tensor_metadata_change());
  if (!weight || !weight->scheme()) return;
  // This is how Module::to(dtype) changes a weight for good: its scales follow where they can.
  const auto codes = weight->codes();
  const at::ScalarType dtype = c10::typeMetaToScalarType(this->dtype());
  if (codes->scale.scalar_type() == dtype) return;
  auto rounded = std::make_shared<const WeightCodes>(round_scales(*codes, dtype));
  if (weight->live()) return weight->seed_cache(std::move(rounded));
  auto cell = std::make_shared<WeightCell>(weight->scheme(), std::move(rounded));
  cell->layer = weight->layer;
  weight = std::move(cell);
}

void QTensorImpl::release_resources() {
  weight.reset();
  activation.reset();
  bound.reset();
  c10::TensorImpl::release_resources();
}

void QTensorImpl::refuse_memory_access() {
  set_storage_access_should_throw();
  extra_meta_ = std::make_unique<c10::ExtraMeta>();
  extra_meta_->custom_data_ptr_error_msg_ =
      "Cannot access the memory of a quantized tensor: quantal::dequantize() it first";
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
  std::optional<RowRange> rows;
  std::int64_t length = 0;
  if (impl->weight) {
    rows = as_rows(geometry, impl->weight->sizes(), impl->transposed);
    const bool flat = !impl->weight->live() || impl->weight->latent().is_contiguous();
    if (!rows && !flat) return std::nullopt;
    length = c10::multiply_integers(impl->weight->sizes());
  } else {
    const ActivationCell& cell = *impl->activation;
    length = (cell.codes.defined() ? cell.codes : cell.value).numel();
  }
  TORCH_CHECK(c10::multiply_integers(geometry.sizes) == 0 || geometry.extent() <= length,
              "[quantal] a view of sizes ", geometry.sizes, ", strides ", geometry.strides,
              " and offset ", geometry.offset, " is out of bounds for a quantized tensor of ",
              length, " elements");
  ViewGuard guard(base);
  auto alias = impl->shallow_copy();
  alias->set_geometry(geometry);
  alias->transposed = rows && rows->transposed;
  return at::Tensor(std::move(alias));
}

at::Tensor make_transposed(const at::Tensor& base) {
  const Geometry geometry = swapped(Geometry::of(base));
  at::Tensor alias = *make_alias(base, geometry);
  if (!is_weight(base)) return alias;
  const at::IntArrayRef cell = impl_of(base)->weight->sizes();
  const auto rows = as_rows(geometry, cell, !impl_of(base)->transposed);
  impl_of(alias)->transposed = rows && rows->transposed;
  return alias;
}

std::optional<RowRange> rows_of(const at::Tensor& weight) {
  const QTensorImpl* impl = impl_of(weight);
  return as_rows(Geometry::of(weight), impl->weight->sizes(), impl->transposed);
}

std::optional<PackedRows> packed_rows(const at::Tensor& weight) {
  if (!is_weight(weight) || !impl_of(weight)->weight->scheme() || !weight.device().is_cpu()) {
    return std::nullopt;
  }
  const auto rows = rows_of(weight);
  if (!rows || rows->transposed || !PackedWeight::begins_tile(rows->begin)) return std::nullopt;
  auto packed = impl_of(weight)->weight->packed();
  if (!packed) return std::nullopt;
  return PackedRows{std::move(packed), *rows};
}

bool shows_whole_cell(const at::Tensor& weight) {
  const auto rows = rows_of(weight);
  return rows && !rows->transposed && rows->count == impl_of(weight)->weight->sizes()[0];
}

at::Tensor select_rows(const at::Tensor& full, const RowRange& rows) {
  at::Tensor part = full;
  if (rows.count != full.size(0)) part = part.narrow(0, rows.begin, rows.count);
  return rows.transposed ? part.t() : part;
}

std::shared_ptr<const WeightCodes> weight_codes(const at::Tensor& weight) {
  return impl_of(weight)->weight->codes();
}

at::Tensor activation_codes(const at::Tensor& t) {
  return Geometry::of(t).view_of(impl_of(t)->activation->codes);
}

at::Tensor quantized_value(const at::Tensor& t) {
  const QTensorImpl* impl = impl_of(t);
  if (impl->activation) {
    const ActivationCell& cell = *impl->activation;
    if (!cell.codes.defined()) return Geometry::of(t).view_of(cell.value).to(t.scalar_type());
    const at::Tensor codes = activation_codes(t);
    if (cell.qtype == qint8 && is_cpu_activation(t) && codes.is_non_overlapping_and_dense()) {
      return dequantize_on_cpu(codes, cell.scale.item<float>(), t.scalar_type());
    }
    return codes.to(at::kFloat).mul_(cell.scale).to(t.scalar_type());
  }
  if (!impl->weight->scheme()) return latent_of(t);
  WeightCell& cell = *impl->weight;
  const auto rows = rows_of(t);
  if (!rows) return decode_view(cell, Geometry::of(t), t.scalar_type());
  const at::Tensor part = cell.decode(rows->begin, rows->count, t.scalar_type());
  return rows->transposed ? part.t() : part;
}

at::Tensor float_value(const at::Tensor& t) {
  const QTensorImpl* impl = impl_of(t);
  return impl->weight && impl->weight->live() ? latent_of(t) : quantized_value(t);
}

at::Tensor latent_of(const at::Tensor& t) {
  const at::Tensor latent = impl_of(t)->weight->latent().alias();
  if (const auto rows = rows_of(t)) return select_rows(latent, *rows);
  const Geometry geometry = Geometry::of(t);
  return latent.as_strided(geometry.sizes, geometry.strides,
                           latent.storage_offset() + geometry.offset);
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
