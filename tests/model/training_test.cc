// Training live weights is training plain parameters that are quantized anew in every forward pass,
// bit for bit.
#include "model/models.h"

namespace quantal {
namespace {

namespace nn = torch::nn;
namespace optim = torch::optim;
using Tensors = std::vector<at::Tensor>;

struct ConvNetImpl : nn::Module {
  ConvNetImpl() {
    torch::manual_seed(6);
    conv = register_module("conv", nn::Conv2d(nn::Conv2dOptions(3, 8, 3).padding(1)));
    linear = register_module("linear", nn::Linear(8 * 16, 16));
    head = register_module("head", nn::Linear(nn::LinearOptions(16, 4).bias(false)));
  }
  at::Tensor forward(const at::Tensor& x) {
    return run(x, conv->weight, linear->weight, head->weight);
  }
  at::Tensor run(const at::Tensor& x, const at::Tensor& first, const at::Tensor& second,
                 const at::Tensor& third) {
    namespace F = nn::functional;
    at::Tensor y = torch::relu(F::detail::conv2d(x, first, conv->bias, 1, 1, 1, 1));
    y = torch::tanh(F::linear(y.flatten(1), second, linear->bias));
    return F::linear(y.unsqueeze(1), third).squeeze(1);
  }
  nn::Conv2d conv{nullptr};
  nn::Linear linear{nullptr};
  nn::Linear head{nullptr};
};
TORCH_MODULE(ConvNet);

struct Twin {
  ConvNet net;
  WeightOptions options;
  at::Tensor forward(const at::Tensor& x) {
    return net->run(x, quantize_weight(net->conv->weight, options),
                    quantize_weight(net->linear->weight, options),
                    quantize_weight(net->head->weight, options));
  }
};

struct Batch {
  at::Tensor x;
  at::Tensor target;
};

Batch batch(int step) {
  torch::manual_seed(100 + static_cast<unsigned>(step));
  return {torch::randn({5, 3, 4, 4}), torch::randn({5, 4})};
}

at::Tensor float_of(const at::Tensor& parameter) {
  return (is_live(parameter) ? latent(parameter) : parameter).detach();
}

void expect_same_parameters(const nn::Module& model, const nn::Module& twin) {
  auto wanted = twin.named_parameters();
  for (const auto& parameter : model.named_parameters()) {
    EXPECT_TRUE(same_bits(float_of(parameter.value()), wanted[parameter.key()])) << parameter.key();
  }
}

using MakeOptimizer = std::function<std::unique_ptr<optim::Optimizer>(Tensors)>;

template <typename Optimizer, typename Options>
std::pair<std::string, MakeOptimizer> optimizer(std::string name, Options options) {
  return {std::move(name), [options](Tensors parameters) {
            return std::make_unique<Optimizer>(std::move(parameters), options);
          }};
}

std::vector<std::pair<std::string, MakeOptimizer>> optimizers() {
  return {
      optimizer<optim::SGD>("SGD", optim::SGDOptions(0.05)),
      optimizer<optim::SGD>("SGDMomentum", optim::SGDOptions(0.05).momentum(0.9).dampening(0.1)),
      optimizer<optim::SGD>(
          "SGDNesterovDecay",
          optim::SGDOptions(0.05).momentum(0.9).nesterov(true).weight_decay(0.01)),
      optimizer<optim::Adam>("Adam", optim::AdamOptions(0.01)),
      optimizer<optim::Adam>("AdamAmsgradDecay",
                             optim::AdamOptions(0.01).amsgrad(true).weight_decay(0.01)),
      optimizer<optim::AdamW>("AdamW", optim::AdamWOptions(0.01).weight_decay(0.1)),
      optimizer<optim::RMSprop>("RMSprop",
                                optim::RMSpropOptions(0.01).momentum(0.5).centered(true)),
      optimizer<optim::Adagrad>("Adagrad", optim::AdagradOptions(0.05).weight_decay(0.01)),
      optimizer<optim::LBFGS>("LBFGS", optim::LBFGSOptions(0.1).max_iter(4)),
      optimizer<optim::LBFGS>("LBFGSWolfe",
                              optim::LBFGSOptions(1).max_iter(3).line_search_fn("strong_wolfe")),
  };
}

using OptimizerCase = std::pair<std::string, MakeOptimizer>;
class EveryOptimizer : public testing::TestWithParam<OptimizerCase> {};

INSTANTIATE_TEST_SUITE_P(, EveryOptimizer, testing::ValuesIn(optimizers()),
                         [](const auto& info) { return info.param.first; });

template <typename Forward>
double train(optim::Optimizer& optimizer, const Batch& data, const Forward& forward) {
  return optimizer
      .step([&] {
        optimizer.zero_grad();
        at::Tensor loss = torch::mse_loss(forward(data.x), data.target);
        loss.backward();
        return loss;
      })
      .template item<double>();
}

TEST_P(EveryOptimizer, trains_live_weights_like_ones_quantized_in_each_pass) {
  for (const QType& qtype : {qint8, qint4, qint2, qfloat8_e4m3fn, qfloat8_e5m2}) {
    SCOPED_TRACE(std::string(qtype.name));
    ConvNet model;
    Twin twin{ConvNet(), {.qtype = qtype}};
    quantize(model, {.weights = qtype});
    const auto ours = GetParam().second(model->parameters());
    const auto theirs = GetParam().second(twin.net->parameters());
    const at::Tensor start = float_of(model->conv->weight).clone();
    for (int step = 0; step < 4; ++step) {
      const double loss =
          train(*ours, batch(step), [&](const at::Tensor& x) { return model->forward(x); });
      const double wanted =
          train(*theirs, batch(step), [&](const at::Tensor& x) { return twin.forward(x); });
      ASSERT_EQ(loss, wanted) << "in step " << step;
    }
    expect_same_parameters(*model, *twin.net);
    EXPECT_GT((float_of(model->conv->weight) - start).abs().max().item<float>(), 1e-4);
    const at::Tensor live = model->forward(batch(9).x);
    EXPECT_TRUE(same_bits(live, twin.forward(batch(9).x)));
    freeze(model);
    EXPECT_TRUE(same_bits(model->forward(batch(9).x), live));
  }
}

TEST(Training, runs_without_fallbacks_that_read_the_float_weight) {
  ConvNet model;
  quantize(model, {.weights = qint8});
  reset_fallback_counts();
  torch::mse_loss(model->forward(batch(0).x), batch(0).target).backward();
  EXPECT_THAT(fallback_counts(), testing::IsEmpty());
}

TEST(Training, clipping_gradients_matches_the_twin) {
  ConvNet model;
  Twin twin{ConvNet(), {.qtype = qint8}};
  quantize(model, {.weights = qint8});
  optim::SGD ours(model->parameters(), 0.1);
  optim::SGD theirs(twin.net->parameters(), 0.1);
  for (int step = 0; step < 3; ++step) {
    ours.zero_grad();
    theirs.zero_grad();
    torch::mse_loss(model->forward(batch(step).x), batch(step).target).backward();
    torch::mse_loss(twin.forward(batch(step).x), batch(step).target).backward();
    const double norm = nn::utils::clip_grad_norm_(model->parameters(), 0.1);
    EXPECT_EQ(norm, nn::utils::clip_grad_norm_(twin.net->parameters(), 0.1));
    EXPECT_GT(norm, 0.1);
    nn::utils::clip_grad_value_(model->parameters(), 0.01);
    nn::utils::clip_grad_value_(twin.net->parameters(), 0.01);
    ours.step();
    theirs.step();
  }
  expect_same_parameters(*model, *twin.net);
}

TEST(Training, accumulating_gradients_matches_the_twin) {
  ConvNet model;
  Twin twin{ConvNet(), {.qtype = qint4}};
  quantize(model, {.weights = qint4});
  optim::Adam ours(model->parameters(), 0.01);
  optim::Adam theirs(twin.net->parameters(), 0.01);
  for (int step = 0; step < 6; ++step) {
    torch::mse_loss(model->forward(batch(step).x), batch(step).target).backward();
    torch::mse_loss(twin.forward(batch(step).x), batch(step).target).backward();
    if (step % 3 < 2) continue;
    ours.step();
    theirs.step();
    ours.zero_grad(/*set_to_none=*/false);
    theirs.zero_grad(/*set_to_none=*/false);
  }
  expect_same_parameters(*model, *twin.net);
}

TEST(Training, writes_to_the_weights_reach_the_next_forward) {
  ConvNet model;
  Twin twin{ConvNet(), {.qtype = qint8}};
  quantize(model, {.weights = qint8});
  const auto write = [](const ConvNet& net, auto weight_of) {
    torch::NoGradGuard no_grad;
    weight_of(net->conv).mul_(0.5);
    weight_of(net->linear)[3][7] = 2.0;
    weight_of(net->head).copy_(torch::ones({4, 16}) * 0.3);
    nn::init::constant_(weight_of(net->conv)[1], 0.25);
  };
  const auto weight_of = [](const auto& layer) { return layer->weight; };
  write(model, weight_of);
  write(twin.net, weight_of);
  expect_same_parameters(*model, *twin.net);
  EXPECT_TRUE(same_bits(model->forward(batch(0).x), twin.forward(batch(0).x)));
}

TEST(Training, a_frozen_model_still_trains_its_biases_and_float_layers) {
  ConvNet model;
  quantize(model, {.weights = qint8, .exclude = {"head"}});
  optim::Adam optimizer(model->parameters(), 0.01);  // from before freeze(): nothing to rebuild
  const auto forward = [&](const at::Tensor& x) { return model->forward(x); };
  const double first = train(optimizer, batch(0), forward);
  freeze(model);
  const at::Tensor codes = parts(model->conv->weight).data.clone();
  const at::Tensor bias = model->conv->bias.detach().clone();
  const at::Tensor head = model->head->weight.detach().clone();
  double last = 0;
  for (int step = 0; step < 30; ++step) last = train(optimizer, batch(0), forward);
  EXPECT_LT(last, 0.5 * first);
  EXPECT_TRUE(same_bits(parts(model->conv->weight).data, codes));
  EXPECT_FALSE(at::equal(model->conv->bias, bias));
  EXPECT_FALSE(at::equal(model->head->weight, head));
  EXPECT_FALSE(model->conv->weight.grad().defined());
}

TEST(Training, reaches_layers_below_a_frozen_one) {
  ConvNet model;
  Twin twin{ConvNet(), {.qtype = qint8}};
  quantize(model, {.weights = qint8, .include = {"linear"}});
  freeze(model);
  at::Tensor loss = torch::mse_loss(model->forward(batch(0).x), batch(0).target);
  loss.backward();
  const at::Tensor wanted =
      torch::mse_loss(twin.net->run(batch(0).x, twin.net->conv->weight,
                                    quantize_weight(twin.net->linear->weight, twin.options),
                                    twin.net->head->weight),
                      batch(0).target);
  wanted.backward();
  EXPECT_TRUE(same_bits(loss, wanted));
  EXPECT_TRUE(same_bits(model->conv->weight.grad(), twin.net->conv->weight.grad()));
}

TEST(Training, an_optimizer_from_before_goes_on_as_if_the_weights_were_the_same) {
  ConvNet model;
  Twin twin{ConvNet(), {.qtype = qint8}};
  optim::Adam ours(model->parameters(), 0.01);
  optim::Adam theirs(twin.net->parameters(), 0.01);
  for (int step = 0; step < 6; ++step) {
    if (step == 3) quantize(model, {.weights = qint8}, ours);
    train(ours, batch(step), [&](const at::Tensor& x) { return model->forward(x); });
    train(theirs, batch(step),
          [&](const at::Tensor& x) { return step < 3 ? twin.net->forward(x) : twin.forward(x); });
  }
  expect_same_parameters(*model, *twin.net);
}

TEST(Training, with_dynamic_activations_lowers_the_loss) {
  ConvNet model;
  quantize(model, {.weights = qint8, .activations = qint8});
  optim::Adam optimizer(model->parameters(), 0.01);
  const auto forward = [&](const at::Tensor& x) { return model->forward(x); };
  const double first = train(optimizer, batch(0), forward);
  double last = 0;
  for (int step = 0; step < 30; ++step) last = train(optimizer, batch(0), forward);
  EXPECT_LT(last, 0.2 * first);
}

}  // namespace
}  // namespace quantal
