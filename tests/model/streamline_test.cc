// Which outputs calibration quantizes, and how codes flow from layer to layer.
#include <c10/core/InferenceMode.h>

#include "model/models.h"

#include <quantal/calibration.h>

namespace quantal {
namespace {

namespace nn = torch::nn;
using testing::ElementsAre;
using testing::IsEmpty;
using testing::UnorderedElementsAre;

const QuantizeOptions kBoth{.weights = qint8, .activations = qint8};

at::Tensor sample(at::IntArrayRef sizes) {
  torch::manual_seed(7);
  return torch::randn(sizes);
}

template <typename Run>
void calibrate(const Model& model, const Run& run, bool streamline = true) {
  torch::NoGradGuard no_grad;
  Calibration calibration(model, {.streamline = streamline});
  run();
}

std::vector<std::string> layers_with_quantized_outputs(const Model& model) {
  std::vector<std::string> names;
  for (const LayerReport& layer : report(model).layers) {
    if (layer.quantizes_output) names.push_back(layer.name);
  }
  return names;
}

nn::Sequential chain() {
  torch::manual_seed(3);
  return nn::Sequential(nn::Linear(24, 16), nn::ReLU(), nn::Linear(16, 16), nn::Sigmoid(),
                        nn::Linear(16, 8));
}

TEST(Streamline, quantizes_outputs_that_quantized_layers_take) {
  nn::Sequential model = chain();
  quantize(model, kBoth);
  calibrate(model, [&] { model->forward(sample({6, 24})); });
  EXPECT_THAT(layers_with_quantized_outputs(model), ElementsAre("0"));
  for (const LayerReport& layer : report(model).layers) {
    EXPECT_EQ(layer.input_scale.has_value(), layer.kind == "Linear") << layer.name;
  }
}

TEST(Streamline, off_quantizes_every_output) {
  nn::Sequential model = chain();
  quantize(model, kBoth);
  calibrate(model, [&] { model->forward(sample({6, 24})); }, /*streamline=*/false);
  EXPECT_THAT(layers_with_quantized_outputs(model), ElementsAre("0", "2", "4"));
  EXPECT_TRUE(is_quantized(model->forward(sample({6, 24}))));
}

TEST(Streamline, decides_anew_in_every_calibration) {
  nn::Sequential model = chain();
  quantize(model, kBoth);
  calibrate(model, [&] { model->forward(sample({6, 24})); }, /*streamline=*/false);
  calibrate(model, [&] { model->forward(sample({6, 24})); });
  EXPECT_THAT(layers_with_quantized_outputs(model), ElementsAre("0"));
}

TEST(Streamline, ignores_layers_that_take_floats) {
  nn::Sequential model(nn::Linear(24, 16), nn::Linear(16, 8));
  quantize(model, {.weights = qint8, .activations = qint8, .include = {"0"}});
  quantize(model, {.weights = qint8, .include = {"1"}});
  calibrate(model, [&] { model->forward(sample({6, 24})); });
  EXPECT_THAT(layers_with_quantized_outputs(model), IsEmpty());
}

struct Through {
  std::string name;
  std::function<at::Tensor(const at::Tensor&)> op;
};

// Outputs stay quantized through operations that keep codes.
TEST(Streamline, follows_outputs_through_operations_that_keep_codes) {
  const std::vector<Through> keeping = {
      {"relu", [](const at::Tensor& x) { return torch::relu(x); }},
      {"relu_", [](const at::Tensor& x) { return x.clone().relu_(); }},
      {"view", [](const at::Tensor& x) { return x.view({6, 4, 4}); }},
      {"flatten", [](const at::Tensor& x) { return x.view({6, 4, 4}).flatten(1); }},
      {"transpose", [](const at::Tensor& x) { return x.view({6, 4, 4}).transpose(1, 2); }},
      {"slice", [](const at::Tensor& x) { return x.slice(0, 0, 3); }},
      {"max_pool1d", [](const at::Tensor& x) { return torch::max_pool1d(x, 2); }},
      {"chunk", [](const at::Tensor& x) { return x.chunk(2, -1)[1]; }},
      {"detach", [](const at::Tensor& x) { return x.detach(); }},
      {"contiguous", [](const at::Tensor& x) { return x.view({6, 4, 4}).mT().contiguous(); }},
      {"dropout", [](const at::Tensor& x) { return torch::dropout(x, 0.5, false); }},
  };
  for (const Through& through : keeping) {
    SCOPED_TRACE(through.name);
    torch::manual_seed(3);
    nn::ModuleList layers(nn::Linear(24, 16), nn::Linear(16, 8));
    const at::Tensor middle = through.op(torch::ones({6, 16}));
    layers[1]->as<nn::LinearImpl>()->weight.set_data(torch::randn({8, middle.size(-1)}));
    quantize(layers, kBoth);
    const auto run = [&] {
      const at::Tensor y = layers[0]->as<nn::LinearImpl>()->forward(sample({6, 24}));
      return layers[1]->as<nn::LinearImpl>()->forward(through.op(y));
    };
    calibrate(layers, run);
    EXPECT_THAT(layers_with_quantized_outputs(layers), ElementsAre("0"));
    reset_fallback_counts();
    const at::Tensor live = run();
    EXPECT_THAT(fallback_counts(), IsEmpty());
    freeze(layers);
    EXPECT_TRUE(same_bits(run(), live));
  }
}

struct ConvNetImpl : nn::Module {
  ConvNetImpl() {
    torch::manual_seed(2);
    conv1 = register_module("conv1", nn::Conv2d(nn::Conv2dOptions(3, 8, 3).padding(1)));
    conv2 = register_module("conv2", nn::Conv2d(nn::Conv2dOptions(8, 8, 3)));
    linear = register_module("linear", nn::Linear(8 * 9, 16));
    norm = register_module("norm", nn::LayerNorm(nn::LayerNormOptions({16})));
    head = register_module("head", nn::Linear(16, 4));
  }
  at::Tensor forward(const at::Tensor& x) {
    at::Tensor y = torch::max_pool2d(torch::relu(conv1(x)), 2);
    y = torch::max_pool2d(torch::relu(conv2(y)), 2);
    return head(norm(linear(y.flatten(1))));
  }
  nn::Conv2d conv1{nullptr}, conv2{nullptr};
  nn::Linear linear{nullptr};
  nn::LayerNorm norm{nullptr};
  nn::Linear head{nullptr};
};
TORCH_MODULE(ConvNet);

// One kernel computes and quantizes; a hook that takes the output of a layer sees the same codes.
TEST(CalibratedModel, codes_of_convolutions_are_those_of_their_quantized_results) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble}) {
    for (const std::int64_t groups : {1, 2, 8}) {
      SCOPED_TRACE(testing::Message() << at::toString(dtype) << ", groups " << groups);
      torch::manual_seed(3);
      nn::Sequential model(nn::Conv2d(nn::Conv2dOptions(8, 8, 3).groups(groups)));
      model->to(dtype);
      const at::Tensor x = sample({2, 8, 9, 7}).to(dtype);
      quantize(model, kBoth);
      calibrate(model, [&] { model->forward(x); });
      const at::Tensor exact = model->forward(x).detach();
      ASSERT_FALSE(is_quantized(exact));
      calibrate(model, [&] { model->forward(x); }, /*streamline=*/false);
      for (const at::Tensor& input : {x, x.contiguous(at::MemoryFormat::ChannelsLast)}) {
        torch::NoGradGuard no_grad;
        const at::Tensor y = model->forward(input);
        ASSERT_TRUE(is_quantized(y));
        EXPECT_TRUE(same_bits(y, quantize_activation(exact, qint8, parts(y).scale)));
        EXPECT_EQ(y.suggest_memory_format(), input.suggest_memory_format());
      }
      EXPECT_TRUE(same_bits(model->forward(x).detach(), model->forward(x)));
    }
  }
}

TEST(CalibratedModel, a_convolution_whose_result_has_a_nan_stays_float) {
  nn::Sequential model(nn::Conv2d(nn::Conv2dOptions(2, 3, 3)));
  const at::Tensor x = sample({2, 2, 5, 5});
  quantize(model, kBoth);
  calibrate(model, [&] { model->forward(x); }, /*streamline=*/false);
  torch::NoGradGuard no_grad;
  model->ptr(0)->as<nn::Conv2dImpl>()->bias[1] = NAN;
  const at::Tensor y = model->forward(x);
  EXPECT_TRUE(y.select(1, 1).isnan().all().item<bool>());
  EXPECT_FALSE(y.select(1, 0).isnan().any().item<bool>());
}

TEST(CalibratedModel, quantizes_outputs_of_convolutions_and_layer_norms) {
  const at::Tensor x = sample({4, 3, 16, 16});
  for (const QType& activations : {qint8, qfloat8_e4m3fn}) {
    ConvNet model;
    const at::Tensor exact = model->forward(x).detach();
    quantize(model, {.weights = qint8, .activations = activations});
    calibrate(model, [&] { model->forward(x); });
    EXPECT_THAT(layers_with_quantized_outputs(model), ElementsAre("conv1", "conv2", "norm"));
    reset_fallback_counts();
    const at::Tensor live = model->forward(x);
    EXPECT_THAT(fallback_counts(), IsEmpty());
    EXPECT_LT(relative_error(live, exact), activations == qint8 ? 0.03 : 0.1);
    {
      torch::NoGradGuard no_grad;
      EXPECT_TRUE(same_bits(model->forward(x), live));
    }
    freeze(model);
    EXPECT_TRUE(same_bits(model->forward(x), live));
    c10::InferenceMode inference;
    EXPECT_TRUE(same_bits(model->forward(x), live));
  }
}

// torch::nn::Linear adds the bias after the product, in place, where the input is not a matrix.
class LinearOutput : public testing::TestWithParam<bool> {};

TEST_P(LinearOutput, is_quantized_after_the_bias_whatever_the_shape_of_the_input) {
  const bool has_bias = GetParam();
  torch::manual_seed(3);
  nn::Linear linear(nn::LinearOptions(24, 16).bias(has_bias));
  quantize(linear, kBoth);
  calibrate(linear, [&] { linear->forward(sample({2, 3, 24})); }, /*streamline=*/false);
  const double scale = report(linear).layers.at(0).output_scale.value();

  nn::Linear weights_only(nn::LinearOptions(24, 16).bias(has_bias));
  weights_only->weight = quantize_weight(latent(linear->weight));
  if (has_bias) weights_only->bias.set_data(linear->bias.detach());
  const at::Tensor x = sample({2, 3, 24});
  EXPECT_NEAR(scale * 127, weights_only->forward(x).abs().max().item<double>(), 1e-5);

  const at::Tensor matrix = linear->forward(x.view({6, 24}));
  for (const at::Tensor& y : {linear->forward(x), linear->forward(x.view({2, 1, 3, 24}))}) {
    EXPECT_TRUE(is_quantized(y));
    EXPECT_TRUE(same_bits(parts(y).data.flatten(), parts(matrix).data.flatten()));
    EXPECT_FLOAT_EQ(parts(y).scale.item<float>(), scale);
  }
  torch::NoGradGuard no_grad;
  EXPECT_TRUE(same_bits(parts(linear->forward(x)).data.flatten(), parts(matrix).data.flatten()));
}

// Without a graph the product gives codes, a block of tokens at a time.
TEST_P(LinearOutput, has_the_same_codes_with_and_without_a_graph) {
  for (const QType& weights : {qint8, qint4}) {
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
      torch::manual_seed(3);
      nn::Linear linear(nn::LinearOptions(24, 48).bias(GetParam()));
      linear->to(dtype);
      quantize(linear, {.weights = weights, .activations = qint8});
      calibrate(linear, [&] { linear->forward(sample({5, 24}).to(dtype)); }, /*streamline=*/false);
      for (const std::vector<std::int64_t>& sizes :
           std::vector<std::vector<std::int64_t>>{{2, 3, 24}, {6, 24}}) {
        const at::Tensor x = sample(sizes).to(dtype);
        const at::Tensor wanted = linear->forward(x.clone().requires_grad_());
        torch::NoGradGuard no_grad;
        const at::Tensor y = linear->forward(x);
        ASSERT_TRUE(is_quantized(y));
        EXPECT_EQ(y.scalar_type(), dtype);
        EXPECT_TRUE(same_bits(parts(y).data, parts(wanted).data));
        EXPECT_TRUE(same_bits(parts(y).scale, parts(wanted).scale));
      }
    }
  }
}

TEST(LinearOutputOfNaN, stays_float) {
  nn::Linear linear(24, 16);
  quantize(linear, kBoth);
  calibrate(linear, [&] { linear->forward(sample({6, 24})); }, /*streamline=*/false);
  torch::NoGradGuard no_grad;
  linear->bias[3] = std::nan("");
  const at::Tensor y = linear->forward(sample({6, 24}));
  EXPECT_TRUE(y.select(1, 3).isnan().all().item<bool>());
  EXPECT_EQ(y.isnan().sum().item<std::int64_t>(), 6);
}

TEST_P(LinearOutput, passes_gradients_to_everything_before_it) {
  torch::manual_seed(3);
  nn::Linear linear(nn::LinearOptions(24, 16).bias(GetParam()));
  quantize(linear, {.activations = qint8});
  calibrate(linear, [&] { linear->forward(sample({2, 3, 24})); }, /*streamline=*/false);
  for (const at::Tensor& shape : {sample({2, 3, 24}), sample({6, 24})}) {
    linear->zero_grad();
    at::Tensor x = shape.clone().requires_grad_();
    const at::Tensor weights = torch::arange(16, torch::kFloat);
    (linear->forward(x) * weights).sum().backward();
    const at::Tensor rows = weights.expand({6, 16});
    EXPECT_LT(relative_error(x.grad().view({6, 24}), rows.mm(latent(linear->weight))), 1e-6);
    if (GetParam()) {
      EXPECT_TRUE(same_bits(linear->bias.grad(), 6 * weights));
    }
    const double scale = report(linear).layers.at(0).input_scale.value();
    const at::Tensor codes = (x.detach().view({6, 24}) / scale).round().clamp(-127, 127) * scale;
    EXPECT_LT(relative_error(linear->weight.grad(), rows.t().mm(codes)), 1e-6);
  }
}

INSTANTIATE_TEST_SUITE_P(, LinearOutput, testing::Bool(), [](const auto& info) {
  return info.param ? "with_bias" : "without_bias";
});

TEST(CalibratedModel, with_attention_runs_live_and_frozen_alike) {
  torch::manual_seed(3);
  nn::TransformerEncoderLayer model(
      nn::TransformerEncoderLayerOptions(16, 4).dim_feedforward(32).dropout(0));
  const at::Tensor x = sample({5, 2, 16});
  const at::Tensor exact = model->forward(x).detach();
  quantize(model, kBoth);
  calibrate(model, [&] { model->forward(x); });
  EXPECT_EQ(quantization_map(model).size(), 6u);
  for (const LayerReport& layer : report(model).layers) {
    EXPECT_EQ(layer.input_scale.has_value(), layer.kind != "LayerNorm") << layer.name;
  }
  const at::Tensor live = model->forward(x);
  freeze(model);
  EXPECT_TRUE(same_bits(model->forward(x), live));
  EXPECT_LT(relative_error(live, exact), 0.03);
}

TEST(CalibratedModel, trains_and_freezes_to_what_it_trained) {
  nn::Sequential model = two_linears();
  quantize(model, kBoth);
  const at::Tensor x = sample({6, 24});
  const at::Tensor target = torch::randn({6, 8});
  calibrate(model, [&] { model->forward(x); });
  torch::optim::Adam optimizer(model->parameters(), 0.01);
  double first = 0, last = 0;
  for (int step = 0; step < 40; ++step) {
    optimizer.zero_grad();
    const at::Tensor loss = torch::mse_loss(model->forward(x), target);
    loss.backward();
    optimizer.step();
    last = loss.item<double>();
    if (step == 0) first = last;
  }
  EXPECT_LT(last, 0.5 * first);
  const at::Tensor live = model->forward(x);
  freeze(model);
  EXPECT_TRUE(same_bits(model->forward(x), live));
}

}  // namespace
}  // namespace quantal
