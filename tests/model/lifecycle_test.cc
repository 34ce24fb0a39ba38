// What a program does with a model between quantizing and saving it, for every qtype.
#include <ATen/autocast_mode.h>
#include <c10/core/InferenceMode.h>

#include <sstream>
#include <thread>

#include "model/models.h"

#include <quantal/calibration.h>

namespace quantal {
namespace {

namespace nn = torch::nn;
using testing::HasSubstr;

// Convolution, linear, normalization, recurrence and attention in one.
struct MixedImpl : nn::Cloneable<MixedImpl> {
  MixedImpl() { reset(); }
  void reset() override {
    torch::manual_seed(2);
    conv = register_module("conv", nn::Conv2d(nn::Conv2dOptions(3, 4, 3).padding(1)));
    linear = register_module("linear", nn::Linear(64, 16));
    norm = register_module("norm", nn::LayerNorm(nn::LayerNormOptions({16})));
    gru = register_module("gru", nn::GRU(nn::GRUOptions(16, 16).batch_first(true)));
    attention = register_module("attention", nn::MultiheadAttention(16, 2));
    dropout = register_module("dropout", nn::Dropout(0.5));
    head = register_module("head", nn::Linear(16, 5));
  }
  at::Tensor forward(const at::Tensor& x) {
    at::Tensor y = norm(linear(torch::relu(conv(x)).flatten(2)));
    y = std::get<0>(gru(y)).transpose(0, 1);
    y = std::get<0>(attention(y, y, y)).mean(0);
    return head(dropout(y));
  }
  nn::Conv2d conv{nullptr};
  nn::Linear linear{nullptr};
  nn::LayerNorm norm{nullptr};
  nn::GRU gru{nullptr};
  nn::MultiheadAttention attention{nullptr};
  nn::Dropout dropout{nullptr};
  nn::Linear head{nullptr};
};
TORCH_MODULE(Mixed);

at::Tensor sample() {
  torch::manual_seed(7);
  return torch::randn({2, 3, 8, 8});
}

Mixed quantized(const QuantizeOptions& options) {
  Mixed model;
  model->eval();
  quantize(model, options);
  return model;
}

class Lifecycle : public testing::TestWithParam<QType> {
 protected:
  QuantizeOptions options() const { return {.weights = GetParam()}; }
};

INSTANTIATE_TEST_SUITE_P(, Lifecycle, testing::ValuesIn(all_qtypes()),
                         [](const auto& info) { return std::string(info.param.name); });

// Every parameter of a model, quantized ones as their codes.
std::vector<at::Tensor> contents(const nn::Module& model) {
  std::vector<at::Tensor> all;
  for (const at::Tensor& t : model.parameters()) {
    all.push_back(is_quantized(t) ? parts(t).data.clone() : t.detach().clone());
  }
  return all;
}

void expect_same_contents(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_TRUE(same_bits(a[i].to(at::kFloat), b[i].to(at::kFloat))) << i;
  }
}

void train_a_step(Mixed& model) {
  torch::optim::SGD optimizer(model->parameters(), 0.1);
  optimizer.zero_grad();
  model->forward(sample()).square().sum().backward();
  optimizer.step();
}

TEST_P(Lifecycle, a_clone_of_a_live_model_is_equal_and_independent) {
  Mixed model = quantized(options());
  Mixed copy = quantal::clone(model);
  EXPECT_TRUE(same_bits(copy->forward(sample()), model->forward(sample())));
  EXPECT_EQ(quantized_parameters(*copy), quantized_parameters(*model));
  EXPECT_EQ(quantization_map(copy), quantization_map(model));
  const auto before = contents(*model);
  train_a_step(copy);
  expect_same_contents(contents(*model), before);
  EXPECT_FALSE(at::equal(latent(copy->head->weight), latent(model->head->weight)));
  freeze(model);
  EXPECT_TRUE(is_live(copy->head->weight));
  EXPECT_FALSE(copy->is_training());
}

TEST_P(Lifecycle, a_clone_of_a_frozen_model_is_equal_and_independent) {
  Mixed model = quantized(options());
  freeze(model);
  const at::Tensor y = model->forward(sample());
  Mixed copy = quantal::clone(model);
  EXPECT_TRUE(is_frozen(copy->head->weight));
  EXPECT_FALSE(copy->head->weight.requires_grad());
  EXPECT_TRUE(copy->head->bias.requires_grad());
  EXPECT_NE(parts(copy->head->weight).data.const_data_ptr(),
            parts(model->head->weight).data.const_data_ptr());
  torch::NoGradGuard no_grad;
  copy->head->bias.add_(1);
  EXPECT_TRUE(same_bits(model->forward(sample()), y));
  EXPECT_LT(relative_error(copy->forward(sample()), y + 1), kFloatRounding);
}

TEST_P(Lifecycle, a_clone_keeps_calibrated_scales_of_its_own) {
  Mixed model = quantized({.weights = GetParam(), .activations = qint8});
  {
    Calibration calibration(model);
    model->forward(sample());
  }
  const at::Tensor y = model->forward(sample());
  Mixed copy = quantal::clone(model);
  EXPECT_TRUE(same_bits(copy->forward(sample()), y));
  {
    Calibration calibration(copy);
    copy->forward(sample() * 3);
  }
  EXPECT_FALSE(at::equal(copy->forward(sample()), y));
  EXPECT_TRUE(same_bits(model->forward(sample()), y));
}

TEST_P(Lifecycle, to_a_dtype_keeps_codes_and_handles) {
  Mixed live = quantized(options());
  const at::Tensor exact = live->forward(sample());
  Mixed frozen = quantal::clone(live);
  freeze(frozen);
  for (const auto dtype : {torch::kBFloat16, torch::kFloat64, torch::kFloat32}) {
    to(live, dtype);
    to(frozen, dtype);
    const at::Tensor x = sample().to(dtype);
    const at::Tensor y = live->forward(x);
    EXPECT_EQ(y.scalar_type(), dtype);
    EXPECT_TRUE(same_bits(y, frozen->forward(x)));
    EXPECT_LT(relative_error(y, exact), 0.05);
    auto parameters = live->named_parameters();
    EXPECT_TRUE(parameters["head.weight"].is_same(live->head->weight));
    EXPECT_TRUE(parameters["gru.weight_ih_l0"].is_same(live->gru->all_weights()[0]));
    EXPECT_EQ(live->head->weight.scalar_type(), dtype);
    EXPECT_EQ(latent(live->head->weight).scalar_type(), dtype);
    EXPECT_TRUE(is_frozen(frozen->head->weight));
  }
  freeze(live);
  EXPECT_TRUE(same_bits(live->forward(sample()), frozen->forward(sample())));
}

TEST_P(Lifecycle, module_to_does_the_same) {
  Mixed model = quantized(options());
  Mixed twin = quantal::clone(model);
  model->to(torch::kBFloat16);
  to(twin, torch::kBFloat16);
  const at::Tensor x = sample().to(torch::kBFloat16);
  EXPECT_TRUE(same_bits(model->forward(x), twin->forward(x)));
}

TEST_P(Lifecycle, training_goes_on_in_another_dtype) {
  Mixed model = quantized(options());
  to(model, torch::kFloat64);
  const at::Tensor before = latent(model->head->weight).clone();
  torch::optim::SGD optimizer(model->parameters(), 0.1);
  model->forward(sample().to(torch::kFloat64)).square().sum().backward();
  EXPECT_EQ(model->head->weight.grad().scalar_type(), torch::kFloat64);
  optimizer.step();
  EXPECT_LT(relative_error(latent(model->head->weight), before - 0.1 * model->head->weight.grad()),
            1e-12);
}

TEST_P(Lifecycle, to_the_device_it_is_on_changes_nothing) {
  Mixed model = quantized(options());
  const at::Tensor y = model->forward(sample());
  to(model, torch::Device(torch::kCPU));
  model->to(torch::Device(torch::kCPU));
  EXPECT_TRUE(same_bits(model->forward(sample()), y));
  freeze(model);
  to(model, torch::Device(torch::kCPU));
  EXPECT_TRUE(same_bits(model->forward(sample()), y));
  EXPECT_TRUE(raises_value_error([&] { to(model, torch::Device(torch::kMeta)); }, "meta"));
  EXPECT_TRUE(same_bits(model->forward(sample()), y));
}

TEST_P(Lifecycle, zero_grad_train_and_eval_work) {
  Mixed model = quantized(options());
  model->forward(sample()).sum().backward();
  ASSERT_TRUE(model->head->weight.grad().defined());
  model->zero_grad(/*set_to_none=*/false);
  EXPECT_EQ(model->head->weight.grad().abs().sum().item<float>(), 0);
  model->zero_grad();
  EXPECT_FALSE(model->head->weight.grad().defined());
  const at::Tensor evaluated = model->forward(sample());
  model->train();
  EXPECT_TRUE(model->conv->is_training());
  EXPECT_FALSE(at::equal(model->forward(sample()), evaluated)) << "dropout";
  model->eval();
  EXPECT_TRUE(same_bits(model->forward(sample()), evaluated));
}

TEST_P(Lifecycle, gradient_modes_do_not_change_the_output) {
  Mixed model = quantized(options());
  for (const bool is_frozen : {false, true}) {
    if (is_frozen) freeze(model);
    const at::Tensor y = model->forward(sample());
    EXPECT_TRUE(y.requires_grad());
    {
      torch::NoGradGuard no_grad;
      EXPECT_TRUE(same_bits(model->forward(sample()), y));
    }
    c10::InferenceMode inference;
    EXPECT_TRUE(same_bits(model->forward(sample()), y));
  }
}

class Autocast {
 public:
  Autocast() {
    at::autocast::set_autocast_enabled(at::kCPU, true);
    at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  }
  ~Autocast() {
    at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(at::kCPU, false);
  }
};

TEST_P(Lifecycle, autocast_runs_in_bfloat16_and_gradients_stay_fp32) {
  nn::Sequential model = two_linears(48, 32, 8);
  quantize(model, {.weights = GetParam()});
  const at::Tensor x = torch::randn({6, 48});
  const at::Tensor exact = model->forward(x);
  at::Tensor y;
  {
    Autocast autocast;
    y = model->forward(x);
    EXPECT_EQ(y.scalar_type(), torch::kBFloat16);
    EXPECT_EQ(model->forward(x.view({2, 3, 48})).scalar_type(), torch::kBFloat16);
  }
  EXPECT_LT(relative_error(y, exact), 0.02);
  y.sum().backward();
  for (const at::Tensor& t : model->parameters())
    EXPECT_EQ(t.grad().scalar_type(), torch::kFloat32);
  freeze(model);
  Autocast autocast;
  EXPECT_TRUE(same_bits(model->forward(x), y));
}

// Starts before the model ever ran: caches fill under contention.
TEST_P(Lifecycle, eight_threads_compute_what_one_does) {
  const at::Tensor x = sample();
  const at::Tensor expected = quantized(options())->forward(x);
  Mixed model = quantized(options());
  for (const bool is_frozen : {false, true}) {
    if (is_frozen) freeze(model);
    std::atomic<int> wrong = 0;
    std::vector<std::thread> threads;
    for (int t = 0; t < 8; ++t) {
      threads.emplace_back([&] {
        torch::NoGradGuard no_grad;
        for (int i = 0; i < 10; ++i) wrong += !at::equal(model->forward(x), expected);
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(wrong, 0) << (is_frozen ? "frozen" : "live");
  }
}

TEST_P(Lifecycle, what_cannot_work_says_what_to_use) {
  Mixed model = quantized(options());
  for (const bool is_frozen : {false, true}) {
    if (is_frozen) freeze(model);
    std::stringstream stream;
    EXPECT_THAT(error_of([&] { torch::save(model, stream); }), HasSubstr("quantal::save"));
    torch::serialize::OutputArchive archive;
    EXPECT_THAT(error_of([&] {
                  model->save(archive);
                  archive.save_to(stream);
                }),
                HasSubstr("quantal::save"));
    EXPECT_THAT(error_of([&] { model->clone(); }), HasSubstr("quantal::clone"));
    EXPECT_THAT(error_of([&] { torch::pickle_save(model->head->weight); }),
                HasSubstr("quantal::save"));
  }
  EXPECT_TRUE(is_frozen(model->head->weight)) << "nothing of it changed the model";
}

TEST_P(Lifecycle, loading_a_float_archive_fills_the_latents_or_says_what_to_use) {
  Mixed source;
  std::stringstream stream;
  torch::save(source, stream);
  Mixed model = quantized(options());
  {
    torch::NoGradGuard no_grad;
    latent(model->head->weight).zero_();
  }
  freeze(model);
  EXPECT_THAT(error_of([&] { torch::load(model, stream); }), HasSubstr("quantal::load"));
}

TEST_P(Lifecycle, prints_like_a_float_model) {
  std::ostringstream before;
  before << *Mixed();
  Mixed model = quantized(options());
  std::ostringstream live;
  live << *model;
  EXPECT_EQ(live.str(), before.str());
  freeze(model);
  std::ostringstream weight;
  weight << model->head->weight;
  EXPECT_THAT(weight.str(), HasSubstr("CPUFloatType{5,16}"));
}

TEST_P(Lifecycle, an_optimizer_from_before_keeps_its_state_and_steps_the_quantized_weights) {
  Mixed model;
  model->eval();
  torch::optim::Adam optimizer(model->parameters(), 0.01);
  const auto step = [&] {
    optimizer.zero_grad();
    model->forward(sample()).square().sum().backward();
    optimizer.step();
  };
  step();
  step();
  using State = torch::optim::AdamParamState;
  const auto& state = [&](const at::Tensor& t) -> State& {
    return static_cast<State&>(*optimizer.state().at(t.unsafeGetTensorImpl()));
  };
  const at::Tensor average = state(model->head->weight).exp_avg();
  const size_t states = optimizer.state().size();
  EXPECT_TRUE(raises_value_error([&] { quantize(model, options()); }, "built before quantize()"));
  quantize(model, options(), optimizer);
  EXPECT_EQ(optimizer.state().size(), states);
  EXPECT_TRUE(state(model->head->weight).exp_avg().is_same(average));
  const at::Tensor before = latent(model->head->weight).clone();
  step();
  EXPECT_EQ(state(model->head->weight).step(), 3);
  EXPECT_FALSE(at::equal(latent(model->head->weight), before));
  EXPECT_EQ(optimizer.state().size(), states) << "no weight is stepped as a stranger";
}

}  // namespace
}  // namespace quantal
