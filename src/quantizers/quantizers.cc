#include <quantal/quantizer.h>

#include <ATen/ATen.h>

#include <cmath>
#include <limits>
#include <typeinfo>

#include "quantizers/weight_scheme.h"

namespace quantal {
namespace {

// The code nearest to zero.
double smallest_code(const QType& qtype) {
  switch (qtype.id) {
    case QTypeId::kFloat8E4M3FN:
      return 0x1p-9;
    case QTypeId::kFloat8E4M3FNUZ:
      return 0x1p-10;
    case QTypeId::kFloat8E5M2:
      return 0x1p-16;
    default:
      return 1;
  }
}

// The largest scale whose product with the largest code is finite.
template <typename T>
double largest_scale(double levels) {
  T scale = std::numeric_limits<T>::max() / static_cast<T>(levels);
  while (std::isinf(scale * static_cast<T>(levels))) scale = std::nextafter(scale, T(0));
  return scale;
}

// range / levels within bounds. A group of equal values has range 0: scale 1 keeps 0/0 away and
// decodes it exactly. Subnormal numbers count as zero and get code 0: so codes are the same where
// the processor flushes them.
at::Tensor scale_of(const at::Tensor& range, const QType& qtype, double levels) {
  const bool wide = range.scalar_type() == at::kDouble;
  const double tiny = wide ? std::numeric_limits<double>::min()
                           : static_cast<double>(std::numeric_limits<float>::min());
  const double largest = wide ? largest_scale<double>(levels) : largest_scale<float>(levels);
  return at::where(range < tiny, at::ones_like(range),
                   (range / levels).clamp_(2 * tiny / smallest_code(qtype), largest));
}

class Absmax final : public Quantizer {
 public:
  std::string_view name() const override { return "absmax"; }
  bool supports(const QType& qtype) const override { return !qtype.is_affine(); }
  ScaleShift operator()(const at::Tensor& groups, const QType& qtype) const override {
    if (groups.size(1) == 0) return {at::ones({groups.size(0), 1}, groups.options()), {}};
    return {scale_of(groups.abs().amax(1, /*keepdim=*/true), qtype, qtype.qmax), {}};
  }
};

class Max : public Quantizer {
 public:
  std::string_view name() const override { return "max"; }
  bool supports(const QType& qtype) const override { return qtype.is_affine(); }
  ScaleShift operator()(const at::Tensor& groups, const QType& qtype) const override {
    if (groups.size(1) == 0) {
      return {at::ones({groups.size(0), 1}, groups.options()),
              at::zeros({groups.size(0), 1}, groups.options())};
    }
    const double levels = (1 << qtype.bits) - 1;
    const at::Tensor low = groups.amin(1, /*keepdim=*/true);
    const at::Tensor high = groups.amax(1, /*keepdim=*/true);
    const at::Tensor range = high - low;
    // Where the range overflows, the two ends are divided first.
    const at::Tensor scale =
        at::where(range.isinf(), high / levels - low / levels, scale_of(range, qtype, levels));
    return {scale, low.neg()};
  }
};

// Proximal step of the l_p norm: soft threshold of the error.
at::Tensor shrink(const at::Tensor& error, double beta, double lp_norm) {
  const at::Tensor size = error.abs();
  if (lp_norm == 1.0) return error.sign() * (size - 1.0 / beta).relu();
  return error.sign() * (size - (1.0 / beta) * size.pow(lp_norm - 1.0)).relu();
}

class Hqq final : public Max {
 public:
  explicit Hqq(const HqqOptions& options) : options_(options) {
    TORCH_CHECK_VALUE(
        options.iterations >= 0 && options.beta > 0 && options.lp_norm > 0,
        "[quantal::hqq_quantizer] expected iterations >= 0, beta > 0, lp_norm > 0, got ",
        options.iterations, ", ", options.beta, ", ", options.lp_norm);
  }
  std::string_view name() const override {
    return options_ == HqqOptions() ? "hqq" : "hqq with other options";
  }

  ScaleShift operator()(const at::Tensor& groups, const QType& qtype) const override {
    auto [scale, shift] = Max::operator()(groups, qtype);
    if (groups.numel() == 0) return {scale, shift};
    const double levels = (1 << qtype.bits) - 1;
    const auto codes_for = [&](const at::Tensor& s) {
      return ((groups + s) / scale).round_().clamp_(0, levels);
    };
    double beta = options_.beta;
    at::Tensor codes = codes_for(shift);
    at::Tensor error = groups - (scale * codes - shift);
    double best = error.abs().mean().item<double>();
    for (int i = 0; i < options_.iterations; ++i) {
      const at::Tensor target = groups - shrink(error, beta, options_.lp_norm);
      const at::Tensor candidate = (codes * scale - target).mean(1, /*keepdim=*/true);
      codes = codes_for(candidate);
      error = groups - (scale * codes - candidate);
      const double mean_error = error.abs().mean().item<double>();
      if (!(mean_error < best)) break;
      best = mean_error;
      shift = candidate;
      beta *= options_.kappa;
    }
    return {scale, shift};
  }

 private:
  HqqOptions options_;
};

}  // namespace

bool is_by_extremes(const Quantizer& quantizer) {
  return typeid(quantizer) == typeid(Absmax) || typeid(quantizer) == typeid(Max);
}

std::shared_ptr<const Quantizer> absmax_quantizer() { return std::make_shared<Absmax>(); }

std::shared_ptr<const Quantizer> max_quantizer() { return std::make_shared<Max>(); }

std::shared_ptr<const Quantizer> hqq_quantizer(const HqqOptions& options) {
  return std::make_shared<Hqq>(options);
}

std::shared_ptr<const Quantizer> find_quantizer(std::string_view name) {
  if (name == "absmax") return absmax_quantizer();
  if (name == "max") return max_quantizer();
  if (name == "hqq") return hqq_quantizer();
  return nullptr;
}

std::shared_ptr<const Quantizer> default_quantizer(const QType& qtype) {
  return qtype.is_affine() ? max_quantizer() : absmax_quantizer();
}

}  // namespace quantal
