#include <quantal/quantizer.h>

#include <ATen/ATen.h>

#include <limits>

namespace quantal {
namespace {

// A group of equal values has range 0: scale 1 keeps 0/0 away and decodes it exactly. A range
// below the smallest normal would make the quotient overflow.
at::Tensor safe_scale(const at::Tensor& scale) {
  const double tiny = scale.scalar_type() == at::kDouble
                          ? std::numeric_limits<double>::min()
                          : static_cast<double>(std::numeric_limits<float>::min());
  return at::where(scale == 0, at::ones_like(scale), scale.clamp_min(tiny));
}

class Absmax final : public Quantizer {
 public:
  std::string_view name() const override { return "absmax"; }
  bool supports(const QType& qtype) const override { return !qtype.is_affine(); }
  ScaleShift operator()(const at::Tensor& groups, const QType& qtype) const override {
    if (groups.size(1) == 0) return {at::ones({groups.size(0), 1}, groups.options()), {}};
    return {safe_scale(groups.abs().amax(1, /*keepdim=*/true) / qtype.qmax), {}};
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
    at::Tensor scale = (high - low) / levels;
    // Where the range overflows, the two ends are divided first.
    scale = at::where(scale.isinf(), high / levels - low / levels, scale);
    return {safe_scale(scale), low.neg()};
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
    TORCH_CHECK_VALUE(options.iterations >= 0 && options.beta > 0 && options.lp_norm > 0,
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
