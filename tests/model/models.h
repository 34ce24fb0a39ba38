#pragma once

#include <string>
#include <vector>

#include <quantal/qtensor.h>
#include <quantal/quantize.h>

#include <torch/torch.h>

#include <gmock/gmock.h>

/// What the tests of models share.
namespace quantal {

inline void PrintTo(const QType& qtype, std::ostream* out) { *out << qtype.name; }

/// Whether `run` raises a ValueError whose message has `text`.
template <typename Run>
testing::AssertionResult raises_value_error(const Run& run, const std::string& text) {
  try {
    run();
  } catch (const c10::ValueError& error) {
    const std::string message = error.what_without_backtrace();
    if (message.find(text) != std::string::npos) return testing::AssertionSuccess();
    return testing::AssertionFailure() << "the message is: " << message;
  } catch (const std::exception& error) {
    return testing::AssertionFailure() << "another exception: " << error.what();
  }
  return testing::AssertionFailure() << "no exception";
}

/// The message of what `run` raises, "" where it raises nothing.
template <typename Run>
std::string error_of(const Run& run) {
  try {
    run();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

inline testing::AssertionResult same_bits(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor left = a.detach();
  const at::Tensor right = b.detach();
  if (left.sizes() != right.sizes() || left.scalar_type() != right.scalar_type()) {
    return testing::AssertionFailure()
           << left.toString() << left.sizes() << " against " << right.toString() << right.sizes();
  }
  if (at::equal(left, right)) return testing::AssertionSuccess();
  return testing::AssertionFailure()
         << "largest difference " << (left - right).abs().max().item<double>();
}

/// ‖a − b‖ / ‖b‖.
inline double relative_error(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor exact = b.detach().to(at::kDouble);
  return ((a.detach().to(at::kDouble) - exact).norm() / exact.norm()).item<double>();
}

/// ‖ŵ − w‖ / ‖w‖ to expect of uniformly distributed weights: 1 / levels for integers, the largest
/// relative rounding error over √3 for float8.
inline double expected_weight_error(const QType& qtype) {
  if (qtype == qfloat8_e5m2) return 0.125 / std::sqrt(3.0);
  if (qtype.is_floating_point) return 0.0625 / std::sqrt(3.0);
  return 1.0 / ((1 << qtype.bits) - 1);
}

/// A result that two fp32 kernels may sum in different orders.
constexpr double kFloatRounding = 32 * 1.1920929e-07;

/// Every weight of `target` becomes the quantized value of what it was.
inline void round_weights(torch::nn::Module& target, const std::vector<std::string>& names,
                          const WeightOptions& options) {
  torch::NoGradGuard no_grad;
  auto parameters = target.named_parameters();
  for (const std::string& name : names) {
    parameters[name].copy_(
        quantal::dequantize(quantize_weight(parameters[name].detach(), options)));
  }
}

/// The parameters that are quantized weights.
inline std::vector<std::string> quantized_parameters(const torch::nn::Module& module) {
  std::vector<std::string> names;
  for (const auto& parameter : module.named_parameters()) {
    if (is_quantized(parameter.value())) names.push_back(parameter.key());
  }
  return names;
}

/// Two linears with a ReLU between.
inline torch::nn::Sequential two_linears(std::int64_t in = 24, std::int64_t hidden = 32,
                                         std::int64_t out = 8) {
  torch::manual_seed(1);
  return torch::nn::Sequential(torch::nn::Linear(in, hidden), torch::nn::ReLU(),
                               torch::nn::Linear(hidden, out));
}

}  // namespace quantal
