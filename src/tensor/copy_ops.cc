#include "tensor/copy_ops.h"

#include <ATen/ATen.h>

#include "tensor/activation.h"
#include "tensor/qtensor_impl.h"

namespace quantal {
namespace {

WeightCodes moved(const WeightCodes& codes, const c10::Device& device, bool non_blocking) {
  WeightCodes copy = codes;
  for (at::Tensor* part : {&copy.data, &copy.scale, &copy.shift}) {
    if (part->defined()) *part = part->to(device, part->scalar_type(), non_blocking);
  }
  return copy;
}

WeightCodes cloned(const WeightCodes& codes) {
  WeightCodes copy = codes;
  for (at::Tensor* part : {&copy.data, &copy.scale, &copy.shift}) {
    if (part->defined()) *part = part->clone();
  }
  return copy;
}

// A tensor over `cell` that shows what `like` shows of its own.
at::Tensor showing_same(const at::Tensor& like, std::shared_ptr<WeightCell> cell,
                        at::ScalarType dtype) {
  auto t = at::detail::make_tensor<QTensorImpl>(std::move(cell), Geometry::of(like), dtype);
  impl_of(t)->transposed = impl_of(like)->transposed;
  return t;
}

// A view of a weight that is no range of its rows: clones of it are plain tensors.
bool is_odd_view(const at::Tensor& t) { return is_weight(t) && !rows_of(t); }

at::Tensor clone_weight(const at::Tensor& t) {
  const WeightCell& source = *impl_of(t)->weight;
  std::shared_ptr<WeightCell> cell;
  if (source.live()) {
    c10::InferenceMode normal(false);
    cell = std::make_shared<WeightCell>(source.scheme(), source.latent().clone());
  } else {
    cell = std::make_shared<WeightCell>(
        source.scheme(), std::make_shared<const WeightCodes>(cloned(*weight_codes(t))));
  }
  if (source.layer) {
    cell->layer = std::make_shared<LayerState>(*source.layer);
    cell->layer->observer = nullptr;  // a calibration is of one model
  }
  return showing_same(t, std::move(cell), t.scalar_type());
}

at::Tensor weight_to(const at::Tensor& t, at::ScalarType dtype, const c10::Device& device,
                     bool non_blocking) {
  const WeightCell& source = *impl_of(t)->weight;
  std::shared_ptr<WeightCell> cell;
  if (!source.live()) {
    auto codes = weight_codes(t);
    if (device != codes->data.device()) {
      codes = std::make_shared<const WeightCodes>(moved(*codes, device, non_blocking));
    }
    cell = std::make_shared<WeightCell>(source.scheme(), std::move(codes));
  } else {
    c10::InferenceMode normal(false);
    at::AutoDispatchBelowADInplaceOrView below;
    cell = std::make_shared<WeightCell>(
        source.scheme(), source.latent().to(device, dtype, non_blocking, /*copy=*/true));
    // The codes stay those of the unrounded weight, as they would after freezing.
    if (source.scheme() && device == source.device()) cell->seed_cache(weight_codes(t));
  }
  cell->layer = source.layer;
  return showing_same(t, std::move(cell), dtype);
}

void copy_into_weight(const at::Tensor& target, const at::Tensor& source, bool non_blocking) {
  WeightCell& cell = *impl_of(target)->weight;
  if (cell.live()) {
    latent_of(target).copy_(is_qtensor(source) ? float_value(source) : source, non_blocking);
    cell.latent().unsafeGetTensorImpl()->bump_version();
    return;
  }
  TORCH_CHECK(shows_whole_cell(target),
              "[quantal] copy_ into a part of a frozen weight: copy into the whole of it");
  const bool same_form =
      is_weight(source) && impl_of(source)->weight->scheme() && shows_whole_cell(source) &&
      impl_of(source)->weight->scheme()->qtype == cell.scheme()->qtype &&
      impl_of(source)->weight->scheme()->group_size == cell.scheme()->group_size &&
      source.sizes() == target.sizes();
  std::shared_ptr<const WeightCodes> codes;
  if (same_form) {
    codes = weight_codes(source);
    if (codes->data.device() != target.device()) {
      codes = std::make_shared<const WeightCodes>(moved(*codes, target.device(), non_blocking));
    }
  } else {
    const at::Tensor value = (is_qtensor(source) ? quantized_value(source) : source)
                                 .to(target.device(), target.scalar_type())
                                 .expand_as(target);
    codes = std::make_shared<const WeightCodes>(
        quantize_finite(value, *cell.scheme(), "source of copy_"));
  }
  cell.replace_codes(std::move(codes));
}

}  // namespace

at::Tensor clone(const at::Tensor& t, std::optional<at::MemoryFormat> memory_format) {
  if (is_weight(t)) {
    const bool reorders = memory_format == at::MemoryFormat::Contiguous && !t.is_contiguous();
    return reorders || is_odd_view(t) ? float_value(t).clone(memory_format) : clone_weight(t);
  }
  const ActivationCell& cell = *impl_of(t)->activation;
  if (has_codes(t)) {
    return activation_from_codes(activation_codes(t).clone(memory_format), cell.qtype,
                                 cell.scale.clone(), t.scalar_type());
  }
  const at::Tensor value = quantized_value(t).clone(memory_format);
  return cell.traced ? make_float_activation(value, cell.traced, nullptr) : value;
}

at::Tensor to_copy(const at::Tensor& t, std::optional<at::ScalarType> dtype,
                   std::optional<at::Layout> layout, std::optional<at::Device> device,
                   std::optional<bool> /*pin_memory*/, bool non_blocking,
                   std::optional<at::MemoryFormat> memory_format) {
  const at::ScalarType to_dtype = dtype.value_or(t.scalar_type());
  const c10::Device to_device = device.value_or(t.device());
  // Printing asks for exactly (device, double) and then reads memory.
  const bool prints = device && dtype == at::kDouble;
  const bool strided = layout.value_or(at::kStrided) == at::kStrided;
  const bool is_plain_float = at::isFloatingType(to_dtype) && !at::isFloat8Type(to_dtype);
  if (prints || !strided || !is_plain_float || (is_activation(t) && !has_codes(t))) {
    const at::Tensor value =
        float_value(t).to(to_device, to_dtype, non_blocking, /*copy=*/true, memory_format);
    if (is_activation(t) && impl_of(t)->activation->traced && is_plain_float) {
      return make_float_activation(value, impl_of(t)->activation->traced, nullptr);
    }
    return strided ? value : value.to(at::TensorOptions().layout(layout));
  }
  if (is_weight(t)) return weight_to(t, to_dtype, to_device, non_blocking);
  const ActivationCell& cell = *impl_of(t)->activation;
  return activation_from_codes(activation_codes(t).to(to_device, code_dtype(cell.qtype),
                                                      non_blocking, /*copy=*/true, memory_format),
                               cell.qtype, cell.scale.to(to_device), to_dtype);
}

at::Tensor& copy_into(at::Tensor& target, const at::Tensor& source, bool non_blocking) {
  if (is_weight(target)) {
    copy_into_weight(target, source, non_blocking);
    return target;
  }
  const at::Tensor value = is_qtensor(source) ? float_value(source) : source;
  if (!is_qtensor(target)) {
    target.copy_(value, non_blocking);
    return target;
  }
  materialize(target);
  Geometry::of(target).view_of(impl_of(target)->activation->value).copy_(value, non_blocking);
  return target;
}

at::Tensor& set_source(at::Tensor& target, const at::Tensor& source) {
  const at::Tensor& quantized = is_qtensor(target) ? target : source;
  TORCH_CHECK(false, "[quantal] set_ on a quantized tensor of shape ", quantized.sizes(),
              ", which has no storage: load files with quantal::load or quantal::requantize, float "
              "ones before quantize()");
  return target;
}

bool has_compatible_type(const at::Tensor& self, const at::Tensor& from) {
  TORCH_CHECK(is_qtensor(self) || !is_qtensor(from), "[quantal] a plain tensor of shape ",
              self.sizes(), " cannot become a quantized one: copy modules with quantal::clone");
  if (is_qtensor(from)) return true;
  return is_weight(self) && impl_of(self)->weight->live() && shows_whole_cell(self) &&
         self.sizes() == from.sizes() && self.scalar_type() == from.scalar_type() &&
         self.device() == from.device() && from.layout() == at::kStrided;
}

bool equal(const at::Tensor& a, const at::Tensor& b) {
  if (has_codes(a) && has_codes(b)) {
    const ActivationCell& left = *impl_of(a)->activation;
    const ActivationCell& right = *impl_of(b)->activation;
    if (left.qtype == right.qtype && at::equal(left.scale, right.scale)) {
      return at::equal(activation_codes(a).to(at::kFloat), activation_codes(b).to(at::kFloat));
    }
  }
  return at::equal(is_qtensor(a) ? float_value(a) : a, is_qtensor(b) ? float_value(b) : b);
}

at::Tensor alias(const at::Tensor& t) { return *make_alias(t, Geometry::of(t)); }

}  // namespace quantal
