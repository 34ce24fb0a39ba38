#pragma once

#include <array>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/grad_mode.h>

#include <gmock/gmock.h>

#include <quantal/qtensor.h>

namespace quantal {
inline void PrintTo(const QType& qtype, std::ostream* out) { *out << qtype.name; }
}  // namespace quantal

/// Seeded inputs, error bounds and error messages for the tests of the quantized tensor.
namespace quantal::test {

inline constexpr std::array<std::int64_t, 16> kSizes = {1,  2,  3,  5,  7,   15,  16,  17,
                                                        31, 33, 63, 65, 127, 129, 255, 1023};
inline constexpr std::array<at::ScalarType, 4> kDtypes = {at::kFloat, at::kDouble, at::kBFloat16,
                                                          at::kHalf};

using Sizes = std::vector<std::int64_t>;

inline std::vector<QType> eight_bit_qtypes() {
  return {qint8, qfloat8_e4m3fn, qfloat8_e4m3fnuz, qfloat8_e5m2};
}

/// N(0, 1), the same for the same arguments on every machine.
inline at::Tensor normal(at::IntArrayRef sizes, at::ScalarType dtype = at::kFloat,
                         std::uint64_t seed = 1) {
  auto generator = at::detail::createCPUGenerator(seed);
  return at::randn(sizes, generator, at::dtype(at::kFloat)).to(dtype);
}

/// quantal::dequantize(), which a call by its bare name confuses with at::dequantize().
inline at::Tensor value_of(const at::Tensor& t) { return quantal::dequantize(t); }

/// What operations without a quantized kernel read: the latent of live weights.
inline at::Tensor float_of(const at::Tensor& t) { return is_live(t) ? latent(t) : value_of(t); }

/// The elements in row-major order.
inline std::vector<double> numbers(const at::Tensor& t) {
  const at::Tensor flat = t.detach().to(at::kDouble).contiguous();
  const double* data = flat.const_data_ptr<double>();
  return {data, data + flat.numel()};
}

/// The message of the Error that `run` throws; "no error" where it throws none.
template <typename Error = c10::Error>
std::string error_of(const std::function<void()>& run) {
  try {
    run();
  } catch (const Error& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

template <typename Run>
std::string value_error_of(const Run& run) {
  return error_of<c10::ValueError>(run);
}

/// Half the distance between 1 and the next number.
inline double unit_roundoff(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return std::ldexp(1, -53);
    case at::kFloat:
      return std::ldexp(1, -24);
    case at::kHalf:
      return std::ldexp(1, -11);
    default:
      return std::ldexp(1, -8);
  }
}

/// How far a sum of `terms` products may be from the exact one: accumulated in fp32 (fp64 for
/// double) and rounded once to `dtype`. `magnitude`: the same sum over absolute values.
inline at::Tensor sum_bound(const at::Tensor& exact, const at::Tensor& magnitude,
                            std::int64_t terms, at::ScalarType dtype) {
  const double u = unit_roundoff(dtype == at::kDouble ? at::kDouble : at::kFloat);
  const double gamma = static_cast<double>(terms) * u / (1 - static_cast<double>(terms) * u);
  return magnitude * gamma + exact.abs() * unit_roundoff(dtype) + 1e-30;
}

/// |got - exact| <= bound everywhere; names the worst element otherwise.
inline ::testing::AssertionResult is_within(const at::Tensor& got, const at::Tensor& exact,
                                            const at::Tensor& bound) {
  if (got.sizes() != exact.sizes()) {
    return ::testing::AssertionFailure() << "shape " << got.sizes() << ", not " << exact.sizes();
  }
  if (got.numel() == 0) return ::testing::AssertionSuccess();
  const at::Tensor error = (got.to(at::kDouble) - exact.to(at::kDouble)).abs();
  const at::Tensor excess = (error - bound.to(at::kDouble)).flatten();
  if ((excess <= 0).all().item<bool>()) return ::testing::AssertionSuccess();
  const auto worst = excess.argmax().item<std::int64_t>();
  const auto at_worst = [&](const at::Tensor& t) {
    return t.to(at::kDouble).expand(exact.sizes()).flatten()[worst].item<double>();
  };
  return ::testing::AssertionFailure() << "element " << worst << ": " << at_worst(got) << ", not "
                                       << at_worst(exact) << " within " << at_worst(bound);
}

inline ::testing::AssertionResult is_within(const at::Tensor& got, const at::Tensor& exact,
                                            double bound) {
  return is_within(got, exact, at::full(exact.sizes(), bound, at::kDouble));
}

/// Same shape, dtype and numbers, neither of them quantized afterwards.
inline ::testing::AssertionResult same(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes() || a.scalar_type() != b.scalar_type()) {
    return ::testing::AssertionFailure() << a.scalar_type() << " " << a.sizes() << ", not "
                                         << b.scalar_type() << " " << b.sizes();
  }
  return is_within(value_of(a), value_of(b), 0.0);
}

/// got = x · wᵀ + bias in x's dtype, up to the rounding of fp32 sums (fp64 for double), of w's
/// dtype and of the result. Affine weights are computed as scale · Σ code·x − shift · Σ x, whose
/// terms are at most twice the largest weight.
inline ::testing::AssertionResult is_linear(const at::Tensor& got, const at::Tensor& x,
                                            const at::Tensor& w, const at::Tensor& bias = {}) {
  if (got.scalar_type() != x.scalar_type()) {
    return ::testing::AssertionFailure() << got.scalar_type() << ", not " << x.scalar_type();
  }
  const at::Tensor values = value_of(x).detach().to(at::kDouble);
  const at::Tensor weight =
      value_of(is_quantized(w) ? w.detach().to(at::kDouble) : w).detach().to(at::kDouble);
  const at::Tensor added = bias.defined() ? value_of(bias).detach().to(at::kDouble) : bias;
  const at::Tensor exact = at::linear(values, weight, added);
  at::Tensor largest = weight.abs();
  if (weight.numel() > 0) largest = largest + 2 * weight.abs().max();
  const at::Tensor size = at::linear(values.abs(), largest, added.defined() ? added.abs() : added);
  return is_within(value_of(got), exact,
                   sum_bound(exact, size, weight.size(1) + 8, x.scalar_type()) +
                       size * unit_roundoff(w.scalar_type()));
}

/// Fails the test where an operation inside its scope ran on dequantized values.
class NoFallback {
 public:
  NoFallback() { reset_fallback_counts(); }
  ~NoFallback() { EXPECT_THAT(fallback_counts(), ::testing::IsEmpty()); }
};

/// How often `op` fell back since the last reset_fallback_counts().
inline std::int64_t fallbacks_of(const std::string& op) {
  const auto counts = fallback_counts();
  const auto found = counts.find(op);
  return found == counts.end() ? 0 : found->second;
}

inline at::Tensor leaf(const at::Tensor& t) { return t.detach().clone().set_requires_grad(true); }

inline at::Tensor scalar(double value) { return at::scalar_tensor(value); }

}  // namespace quantal::test
