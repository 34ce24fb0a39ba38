// Activations: dynamic until a Calibration ran, static after it.
#include <c10/core/InferenceMode.h>

#include <iostream>
#include <sstream>
#include <thread>

#include "model/models.h"

#include <quantal/calibration.h>

namespace quantal {
namespace {

namespace nn = torch::nn;
using testing::HasSubstr;
using testing::IsEmpty;

const QuantizeOptions kBoth{.weights = qint8, .activations = qint8};

at::Tensor sample(at::IntArrayRef sizes = {6, 24}, unsigned seed = 7) {
  torch::manual_seed(seed);
  return torch::randn(sizes);
}

nn::Sequential quantized(nn::Sequential model, const QuantizeOptions& options = kBoth) {
  quantize(model, options);
  return model;
}

LayerReport layer(const Model& model, const std::string& name) {
  for (const LayerReport& found : report(model).layers) {
    if (found.name == name) return found;
  }
  throw std::out_of_range(name);
}

template <typename Batches>
void calibrate(nn::Sequential& model, const Batches& batches,
               const CalibrationOptions& options = {}) {
  torch::NoGradGuard no_grad;
  Calibration calibration(model, options);
  for (const at::Tensor& batch : batches) model->forward(batch);
}

void calibrate(nn::Sequential& model, const at::Tensor& batch,
               const CalibrationOptions& options = {}) {
  calibrate(model, std::vector{batch}, options);
}

// What int8 codes of one scale make of x.
at::Tensor rounded(const at::Tensor& x, const at::Tensor& scale) {
  return (x / scale).round().clamp(-127, 127) * scale;
}

// A batch whose largest absolute value is `absmax`.
at::Tensor batch_of(double absmax) {
  at::Tensor x = sample();
  return x * (absmax / x.abs().max());
}

TEST(DynamicActivations, have_one_scale_a_token) {
  nn::Linear linear(24, 8);
  const at::Tensor x = sample({2, 3, 24}) * torch::tensor({1.0, 10.0, 100.0}).view({3, 1});
  quantize(linear, {.activations = qint8});
  const at::Tensor scale = x.abs().amax(-1, true) / 127;
  EXPECT_TRUE(same_bits(linear->forward(x),
                        torch::matmul(rounded(x, scale), linear->weight.t()) + linear->bias));
  EXPECT_EQ(report(linear).layers.at(0).input_scale, std::nullopt);
}

TEST(DynamicActivations, of_a_convolution_have_one_scale_a_sample) {
  nn::Conv2d conv(nn::Conv2dOptions(3, 4, 3));
  const at::Tensor x = sample({2, 3, 8, 8}) * torch::tensor({1.0, 50.0}).view({2, 1, 1, 1});
  const at::Tensor scale = x.abs().amax({1, 2, 3}, true) / 127;
  const at::Tensor expected = conv->forward(rounded(x, scale)).detach();
  quantize(conv, {.activations = qint8});
  EXPECT_TRUE(same_bits(conv->forward(x), expected));
}

TEST(DynamicActivations, are_close_to_float_without_any_calibration) {
  for (const QType& activations : {qint8, qfloat8_e4m3fn, qfloat8_e5m2, qfloat8_e4m3fnuz}) {
    nn::Sequential model = two_linears();
    const at::Tensor exact = model->forward(sample()).detach();
    quantize(model, {.weights = qint8, .activations = activations});
    const double error = relative_error(model->forward(sample()), exact);
    EXPECT_GT(error, 0);
    EXPECT_LT(error, 2 * (expected_weight_error(qint8) + expected_weight_error(activations)))
        << activations.name;
    freeze(model);
    EXPECT_EQ(relative_error(model->forward(sample()), exact), error);
  }
}

TEST(DynamicActivations, survive_zero_and_empty_and_non_finite_tokens) {
  nn::Sequential model = quantized(two_linears());
  EXPECT_TRUE(model->forward(torch::zeros({2, 24})).isfinite().all().item<bool>());
  EXPECT_EQ(model->forward(torch::zeros({0, 24})).sizes(), at::IntArrayRef({0, 8}));
  at::Tensor x = sample({3, 24});
  x[1][2] = std::numeric_limits<float>::quiet_NaN();
  const at::Tensor y = model->forward(x);
  EXPECT_TRUE(y[1].isnan().all().item<bool>()) << "as the float model";
  EXPECT_TRUE(y[0].isfinite().all().item<bool>());
  EXPECT_TRUE(y[2].isfinite().all().item<bool>());
}

TEST(StaticActivations, use_the_calibrated_scale) {
  nn::Sequential model(nn::Linear(24, 8));
  const at::Tensor weight = model[0]->named_parameters()["weight"].detach().clone();
  const at::Tensor bias = model[0]->named_parameters()["bias"].detach().clone();
  quantize(model, {.activations = qint8, .ignore_outside_handles = true});
  calibrate(model, batch_of(2.54));
  EXPECT_FLOAT_EQ(layer(model, "0").input_scale.value(), 0.02);
  const at::Tensor x = batch_of(5);  // saturates
  EXPECT_TRUE(same_bits(model->forward(x),
                        torch::addmm(bias, rounded(x, torch::tensor(2.54f) / 127), weight.t())));
}

TEST(Momentum, weighs_the_past) {
  for (const auto& [momentum, absmax] : {std::pair{0.0, 10.0}, {0.5, 5.5}, {0.9, 1.9}}) {
    nn::Sequential model = quantized(two_linears());
    calibrate(model, std::vector{batch_of(1), batch_of(10)}, {.momentum = momentum});
    EXPECT_NEAR(layer(model, "0").input_scale.value() * 127, absmax, 1e-5);
  }
}

TEST(Momentum, holds_for_outputs_too) {
  nn::Sequential model = quantized(nn::Sequential(nn::Linear(nn::LinearOptions(24, 8).bias(false))),
                                   {.activations = qint8});
  const double first = model->forward(batch_of(1)).abs().max().item<double>();
  calibrate(model, std::vector{batch_of(1), batch_of(10)}, {.momentum = 0.5, .streamline = false});
  EXPECT_NEAR(layer(model, "0").output_scale.value() * 127, 5.5 * first, 0.02 * first);
}

TEST(Momentum, must_be_at_least_zero_and_below_one) {
  nn::Sequential model = quantized(two_linears());
  for (const double momentum : {-0.1, 1.0, std::nan("")}) {
    EXPECT_TRUE(raises_value_error([&] { calibrate(model, sample(), {.momentum = momentum}); },
                                   "expected momentum in [0, 1)"));
  }
}

TEST(Batches, with_nan_or_inf_or_nothing_but_zeros_are_left_out) {
  at::Tensor nan = batch_of(3), inf = batch_of(3);
  nan[2][3] = std::numeric_limits<float>::quiet_NaN();
  inf[2][3] = -std::numeric_limits<float>::infinity();
  // Without biases: zeros stay zeros.
  nn::Sequential model =
      quantized(nn::Sequential(nn::Linear(nn::LinearOptions(24, 32).bias(false)), nn::ReLU(),
                               nn::Linear(nn::LinearOptions(32, 8).bias(false))));
  nn::Sequential twin = quantal::clone(model);
  calibrate(model, std::vector{nan, batch_of(1), inf, torch::zeros({2, 24}), torch::zeros({0, 24}),
                               batch_of(10), nan});
  calibrate(twin, std::vector{batch_of(1), batch_of(10)});
  EXPECT_EQ(layer(model, "0").input_scale, layer(twin, "0").input_scale);
  EXPECT_EQ(layer(model, "2").input_scale, layer(twin, "2").input_scale);
  EXPECT_TRUE(same_bits(model->forward(sample()), twin->forward(sample())));
}

TEST(Batches, of_nothing_else_leave_the_layer_dynamic) {
  nn::Sequential model = quantized(two_linears());
  const at::Tensor dynamic = model->forward(sample());
  calibrate(model, torch::full({2, 24}, std::nan("")));
  calibrate(model, std::vector<at::Tensor>());
  EXPECT_EQ(layer(model, "0").input_scale, std::nullopt);
  EXPECT_EQ(layer(model, "2").output_scale, std::nullopt);
  EXPECT_TRUE(same_bits(model->forward(sample()), dynamic));
}

// 1 marks "not calibrated" elsewhere.
TEST(Scale, may_be_exactly_one) {
  nn::Sequential model = quantized(two_linears());
  calibrate(model, batch_of(127));
  EXPECT_EQ(layer(model, "0").input_scale, 1.0);
  const at::Tensor x = batch_of(127);
  EXPECT_NE(relative_error(model->forward(x), quantized(two_linears())->forward(x)), 0)
      << "one scale for all tokens is not one scale a token";
  nn::Sequential twice = quantized(two_linears());
  calibrate(twice, std::vector{batch_of(127), batch_of(1270)});
  EXPECT_NEAR(layer(twice, "0").input_scale.value(), 0.9 + 0.1 * 10, 1e-6);
}

TEST(Calibration, runs_on_float_activations) {
  nn::Sequential model = two_linears();
  nn::Sequential weights_only = quantal::clone(model);
  quantize(model, kBoth);
  quantize(weights_only, {.weights = qint8});
  Calibration calibration(model);
  EXPECT_TRUE(same_bits(model->forward(sample()), weights_only->forward(sample())));
}

TEST(Calibration, may_run_while_training) {
  nn::Sequential model = quantized(two_linears());
  {
    Calibration calibration(model);
    torch::optim::SGD optimizer(model->parameters(), 0.1);
    model->forward(sample()).square().sum().backward();
    optimizer.step();
  }
  EXPECT_TRUE(layer(model, "2").input_scale.has_value());
  model->zero_grad();
  model->forward(sample()).square().sum().backward();
  EXPECT_GT(model->parameters()[0].grad().abs().sum().item<float>(), 0);
}

TEST(Calibration, left_by_an_exception_leaves_the_model_as_it_was) {
  nn::Sequential model = quantized(two_linears());
  for (const bool was_calibrated : {false, true}) {
    if (was_calibrated) calibrate(model, batch_of(2));
    const at::Tensor y = model->forward(sample());
    const auto scale = layer(model, "0").input_scale;
    EXPECT_ANY_THROW({
      Calibration calibration(model);
      model->forward(batch_of(100));
      model->forward(torch::ones({2, 3}));
    });
    EXPECT_EQ(layer(model, "0").input_scale, scale);
    EXPECT_TRUE(same_bits(model->forward(sample()), y));
  }
}

// The destructor runs while another exception is in flight, but not because of it.
TEST(Calibration, inside_a_destructor_that_unwinds_still_counts) {
  nn::Sequential model = quantized(two_linears());
  struct CalibratesAtExit {
    nn::Sequential& model;
    ~CalibratesAtExit() { calibrate(model, batch_of(2)); }
  };
  EXPECT_ANY_THROW({
    CalibratesAtExit at_exit{model};
    throw std::runtime_error("elsewhere");
  });
  EXPECT_TRUE(layer(model, "0").input_scale.has_value());
}

TEST(Calibration, needs_a_layer_that_quantizes_activations) {
  nn::Sequential model = quantized(two_linears(), {.weights = qint8});
  EXPECT_TRUE(raises_value_error([&] { Calibration calibration(model); },
                                 "no layer of the model quantizes activations"));
}

TEST(Calibration, nested_on_the_same_model_is_an_error_that_harms_nothing) {
  nn::Sequential model = quantized(two_linears());
  {
    Calibration outer(model);
    EXPECT_TRUE(raises_value_error([&] { Calibration inner(model); }, "is being calibrated"));
    EXPECT_TRUE(raises_value_error([&] { Calibration inner(*model[2]); }, "is being calibrated"));
    model->forward(batch_of(1));
  }
  EXPECT_NEAR(layer(model, "0").input_scale.value() * 127, 1, 1e-6);
}

TEST(Calibration, is_scoped_to_its_model) {
  nn::Sequential model = quantized(two_linears());
  nn::Sequential other = quantized(two_linears());
  const at::Tensor y = other->forward(sample());
  {
    Calibration calibration(model);
    model->forward(batch_of(3));
    EXPECT_TRUE(same_bits(other->forward(sample()), y));
    Calibration second(other);
    other->forward(batch_of(5));
  }
  EXPECT_NEAR(layer(model, "0").input_scale.value() * 127, 3, 1e-5);
  EXPECT_NEAR(layer(other, "0").input_scale.value() * 127, 5, 1e-5);
}

TEST(Calibration, runs_in_several_threads_on_several_models) {
  std::vector<nn::Sequential> models;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) models.push_back(quantized(two_linears()));
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      torch::NoGradGuard no_grad;
      Calibration calibration(models[t], {.momentum = 0});
      for (int i = 0; i <= 20; ++i) models[t]->forward(batch_of(1 + t + i));
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int t = 0; t < 4; ++t) {
    EXPECT_NEAR(layer(models[t], "0").input_scale.value() * 127, 21 + t, 1e-4);
  }
}

TEST(Calibration, watches_one_model_run_by_several_threads) {
  nn::Sequential model = quantized(two_linears());
  {
    Calibration calibration(model);
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&] {
        torch::NoGradGuard no_grad;
        for (int i = 0; i < 20; ++i) model->forward(batch_of(2));
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  EXPECT_NEAR(layer(model, "0").input_scale.value() * 127, 2, 1e-5);
}

TEST(Calibration, again_starts_afresh) {
  nn::Sequential model = quantized(two_linears());
  calibrate(model, batch_of(100));
  calibrate(model, batch_of(2));
  EXPECT_NEAR(layer(model, "0").input_scale.value() * 127, 2, 1e-5);
  nn::Sequential once = quantized(two_linears());
  calibrate(once, batch_of(2));
  EXPECT_TRUE(same_bits(model->forward(sample()), once->forward(sample())));
}

TEST(Calibration, after_freezing_gives_what_it_gives_before) {
  for (const QType& activations : {qint8, qfloat8_e4m3fn, qfloat8_e5m2}) {
    for (const QType& weights : {qint8, qint4, qfloat8}) {
      nn::Sequential model = two_linears();
      const at::Tensor exact = model->forward(sample()).detach();
      quantize(model, {.weights = weights, .activations = activations});
      nn::Sequential frozen = quantal::clone(model);
      freeze(frozen);
      calibrate(model, sample());
      calibrate(frozen, sample());
      const at::Tensor live = model->forward(sample());
      EXPECT_TRUE(same_bits(live, frozen->forward(sample())));
      freeze(model);
      EXPECT_TRUE(same_bits(live, model->forward(sample())));
      EXPECT_LT(relative_error(live, exact),
                2 * (expected_weight_error(weights) + 2 * expected_weight_error(activations)))
          << weights.name << " " << activations.name;
    }
  }
}

TEST(Calibration, does_not_reach_a_clone_that_is_made_meanwhile) {
  nn::Sequential model = quantized(two_linears());
  nn::Sequential copy = nullptr;
  const at::Tensor dynamic = model->forward(sample());
  {
    torch::NoGradGuard no_grad;
    Calibration calibration(model);
    model->forward(batch_of(3));
    copy = quantal::clone(model);
    EXPECT_TRUE(same_bits(copy->forward(sample()), dynamic));
  }
  EXPECT_TRUE(same_bits(copy->forward(sample()), dynamic));
  EXPECT_NEAR(layer(model, "0").input_scale.value() * 127, 3, 1e-5);
  calibrate(copy, batch_of(5));
  EXPECT_NEAR(layer(copy, "0").input_scale.value() * 127, 5, 1e-5);
}

TEST(Calibration, may_freeze_meanwhile) {
  nn::Sequential model = quantized(two_linears());
  nn::Sequential twin = quantal::clone(model);
  {
    Calibration calibration(model);
    model->forward(batch_of(3));
    freeze(model);
    model->forward(batch_of(3));
  }
  calibrate(twin, batch_of(3));
  EXPECT_TRUE(same_bits(model->forward(sample()), twin->forward(sample())));
}

TEST(Calibration, under_inference_mode_gives_scales_to_train_with) {
  nn::Sequential model = quantized(two_linears());
  nn::Sequential twin = quantal::clone(model);
  {
    c10::InferenceMode inference;
    Calibration calibration(model);
    model->forward(batch_of(3));
  }
  calibrate(twin, batch_of(3));
  const at::Tensor x = sample().requires_grad_();
  model->forward(x).square().sum().backward();
  const at::Tensor grad = x.grad().clone();
  x.mutable_grad() = at::Tensor();
  twin->forward(x).square().sum().backward();
  EXPECT_TRUE(same_bits(grad, x.grad()));
}

TEST(Calibration, takes_layer_norms_over_several_dimensions) {
  nn::Sequential model(nn::LayerNorm(nn::LayerNormOptions({4, 6})), nn::Flatten(),
                       nn::Linear(24, 8));
  quantize(model, kBoth);
  calibrate(model, sample({6, 4, 6}));
  EXPECT_TRUE(layer(model, "0").quantizes_output);
  const at::Tensor live = model->forward(sample({6, 4, 6}));
  freeze(model);
  EXPECT_TRUE(same_bits(model->forward(sample({6, 4, 6})), live));
}

TEST(Calibration, writes_a_line_a_layer_when_asked) {
  nn::Sequential model = quantized(two_linears());
  std::ostringstream log;
  std::streambuf* before = std::clog.rdbuf(log.rdbuf());
  calibrate(model, std::vector{batch_of(2), torch::zeros({1, 24})});
  const std::string silent = log.str();
  calibrate(model, std::vector{batch_of(2), torch::zeros({1, 24})}, {.debug = true});
  std::clog.rdbuf(before);
  EXPECT_EQ(silent, "");
  EXPECT_THAT(log.str(), HasSubstr("calibrated 0: input 2.000000 over 1 batches (1 left out), "));
  EXPECT_THAT(log.str(), HasSubstr("calibrated 2: input "));
  EXPECT_EQ(std::ranges::count(log.str(), '\n'), 2);
}

}  // namespace
}  // namespace quantal
