#include "tensor/activation.h"

#include <ATen/ATen.h>

#include "ops/cpu_kernels.h"
#include "tensor/autograd.h"

namespace quantal {
namespace {

at::Tensor codes_of(const at::Tensor& x, const QType& qtype, const at::Tensor& scale) {
  const at::ScalarType compute = arithmetic_dtype(x.scalar_type());
  return cast_codes(x.to(compute).div(scale.to(compute)), qtype);
}

bool has_nan(const at::Tensor& x) {
  return x.numel() > 0 && x.sum().isnan().item<bool>() && x.isnan().any().item<bool>();
}

std::shared_ptr<LayerObserver> observer_of(const LayerState& layer) { return layer.observer; }

void observe(RangeStatistics LayerObserver::* edge, LayerObserver& observer, const at::Tensor& x) {
  at::AutoDispatchBelowADInplaceOrView below;
  std::lock_guard lock(observer.mutex);
  (observer.*edge).update(x, observer.momentum);
}

bool quantizes_output(const LayerState& layer) {
  return layer.quantize_output && layer.output_scale.defined();
}

}  // namespace

void RangeStatistics::update(const at::Tensor& value, double momentum) {
  const double batch = value.numel() == 0 ? 0 : value.abs().amax().item<double>();
  if (!std::isfinite(batch) || batch == 0) {
    ++skipped;
    return;
  }
  ++batches;
  absmax = absmax ? momentum * *absmax + (1 - momentum) * batch : batch;
}

at::Tensor RangeStatistics::scale(const QType& qtype, at::Device device) const {
  if (!absmax) return {};
  const double scale = std::max(*absmax / qtype.qmax, kSmallestScale);
  return at::scalar_tensor(scale, at::TensorOptions().dtype(at::kFloat).device(device));
}

bool has_codes(const at::Tensor& t) {
  return is_activation(t) && impl_of(t)->activation->codes.defined();
}

bool has_int8_codes(const at::Tensor& t) {
  return has_codes(t) && impl_of(t)->activation->qtype == qint8;
}

at::Tensor activation_from_codes(const at::Tensor& codes, const QType& qtype,
                                 const at::Tensor& scale, at::ScalarType dtype) {
  auto cell = std::make_shared<ActivationCell>();
  cell->qtype = qtype;
  cell->codes = flat_storage(codes);
  cell->scale = scale;
  return make_activation(std::move(cell), Geometry::of(codes), dtype);
}

at::Tensor quantize_activation_ste(const at::Tensor& x, const QType& qtype,
                                   const at::Tensor& scale) {
  return straight_through(x, [&](const at::Tensor& value) {
    const at::Tensor fixed = scale.to(value.device(), at::kFloat);
    if (qtype == qint8 && is_cpu_activation(value)) {
      const auto codes = int8_codes(value, fixed.item<float>());
      if (!codes) return make_float_activation(value.clone(), nullptr, nullptr);
      return activation_from_codes(*codes, qtype, fixed, x.scalar_type());
    }
    if (has_nan(value)) return make_float_activation(value.clone(), nullptr, nullptr);
    return activation_from_codes(codes_of(value, qtype, fixed), qtype, fixed, x.scalar_type());
  });
}

at::Tensor fake_quantize_tokens(const at::Tensor& x, const QType& qtype, TokenAxis axis) {
  return straight_through(
      x, [&](const at::Tensor& value) { return fake_quantize_dynamic(value, qtype, axis); });
}

bool quantizes_dynamically(const std::shared_ptr<LayerState>& layer, const at::Tensor& x) {
  return layer && layer->activations && layer->quantizes_input && !observer_of(*layer) &&
         !layer->input_scale.defined() &&
         !(has_codes(x) && impl_of(x)->activation->qtype == *layer->activations);
}

at::Tensor prepare_input(const std::shared_ptr<LayerState>& layer, const at::Tensor& x,
                         TokenAxis axis) {
  if (!layer || !layer->activations || !layer->quantizes_input) return x;
  const QType& qtype = *layer->activations;
  if (const auto observer = observer_of(*layer)) {
    if (is_activation(x)) {
      if (const auto& producer = impl_of(x)->activation->traced; producer && producer->observer) {
        std::lock_guard lock(producer->observer->mutex);
        producer->observer->consumed_quantized = true;
      }
    }
    const at::Tensor value = dequantize_ste(x);
    observe(&LayerObserver::input, *observer, value);
    return value;
  }
  if (has_codes(x) && impl_of(x)->activation->qtype == qtype) return x;
  const at::Tensor value = dequantize_ste(x);
  if (layer->input_scale.defined())
    return quantize_activation_ste(value, qtype, layer->input_scale);
  return fake_quantize_tokens(value, qtype, axis);
}

at::Tensor finish_output(const std::shared_ptr<LayerState>& layer, const at::Tensor& y,
                         bool bias_follows) {
  if (!layer || !layer->activations || has_codes(y)) return y;
  const auto observer = observer_of(*layer);
  if (!observer && !quantizes_output(*layer)) return y;
  if (bias_follows && layer->has_bias) {
    return straight_through(
        y, [&](const at::Tensor& value) { return make_float_activation(value, nullptr, layer); });
  }
  if (!observer) return quantize_activation_ste(y, *layer->activations, layer->output_scale);
  observe(&LayerObserver::output, *observer, y);
  return straight_through(
      y, [&](const at::Tensor& value) { return make_float_activation(value, layer, nullptr); });
}

at::Tensor int8_output_scale(const std::shared_ptr<LayerState>& layer, bool bias_follows) {
  const bool is_int8 = layer && layer->activations == qint8 && !observer_of(*layer) &&
                       quantizes_output(*layer) && !(bias_follows && layer->has_bias);
  return is_int8 ? layer->output_scale : at::Tensor();
}

void finish_pending(const at::Tensor& activation) {
  ActivationCell& cell = *impl_of(activation)->activation;
  const std::shared_ptr<LayerState> layer = std::exchange(cell.pending, nullptr);
  if (const auto observer = observer_of(*layer)) {
    observe(&LayerObserver::output, *observer, cell.value);
    cell.traced = layer;
    return;
  }
  if (!quantizes_output(*layer) || has_nan(cell.value)) return;
  cell.qtype = *layer->activations;
  cell.scale = layer->output_scale.to(cell.value.device(), at::kFloat);
  cell.codes = codes_of(cell.value, cell.qtype, cell.scale);
  cell.value = at::Tensor();
}

}  // namespace quantal
