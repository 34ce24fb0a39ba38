// TorchScript models: quantized in place as torch::nn ones are.
#include <torch/script.h>

#include <sstream>

#include "model/models.h"

#include <quantal/calibration.h>

namespace quantal {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::UnorderedElementsAre;
using Script = torch::jit::Module;

// A module that says it is `type`, as torch.jit.script names it.
Script module_of(const std::string& type) {
  return Script("__torch__.torch.nn.modules.quantal_test." + type);
}

at::Tensor trainable(const at::Tensor& t) { return t.detach().set_requires_grad(true); }

Script linear_module(std::int64_t in, std::int64_t out, bool has_bias = true) {
  Script module = module_of("Linear");
  module.register_parameter("weight", trainable(torch::rand({out, in}) - 0.5), false);
  if (has_bias) {
    module.register_parameter("bias", trainable(torch::rand({out}) - 0.5), false);
  } else {
    module.register_attribute("bias", c10::NoneType::get(), c10::IValue());
  }
  module.define("def forward(self, x):\n  return torch.linear(x, self.weight, self.bias)\n");
  return module;
}

Script conv_module(std::int64_t in, std::int64_t out) {
  Script module = module_of("Conv2d");
  module.register_parameter("weight", trainable((torch::rand({out, in, 3, 3}) - 0.5) / 3), false);
  module.register_parameter("bias", trainable(torch::rand({out}) - 0.5), false);
  module.define("def forward(self, x):\n  return torch.conv2d(x, self.weight, self.bias)\n");
  return module;
}

// conv -> relu -> linear -> tanh -> linear, with a submodule of its own for the linears.
Script net() {
  torch::manual_seed(4);
  Script head("__torch__.Head");
  head.register_module("fc1", linear_module(4L * 36, 16));
  head.register_module("fc2", linear_module(16, 5, /*has_bias=*/false));
  head.define(
      "def forward(self, x):\n  return self.fc2.forward(torch.tanh(self.fc1.forward(x)))\n");
  Script root("__torch__.Net");
  root.register_module("conv", conv_module(3, 4));
  root.register_module("head", head);
  root.register_buffer("offset", torch::full({}, 0.25));
  root.define(
      "def forward(self, x):\n"
      "  y = torch.flatten(torch.relu(self.conv.forward(x)), 1)\n"
      "  return self.head.forward(y) + self.offset\n");
  return root;
}

at::Tensor sample() {
  torch::manual_seed(7);
  return torch::randn({3, 3, 8, 8});
}

at::Tensor run(Script& module, const at::Tensor& x = sample()) {
  return module.forward({x}).toTensor();
}

std::vector<std::string> quantized_names(const Script& module) {
  std::vector<std::string> names;
  for (const auto parameter : module.named_parameters()) {
    if (is_quantized(parameter.value)) names.push_back(parameter.name);
  }
  return names;
}

at::Tensor parameter(const Script& module, const std::string& name) {
  for (const auto found : module.named_parameters()) {
    if (found.name == name) return found.value;
  }
  throw std::out_of_range(name);
}

TEST(Script, weights_are_swapped_in_every_submodule) {
  Script model = net();
  const Report report = quantize(model, {.weights = qint8});
  EXPECT_THAT(quantized_names(model),
              UnorderedElementsAre("conv.weight", "head.fc1.weight", "head.fc2.weight"));
  EXPECT_TRUE(is_live(parameter(model, "conv.weight")));
  std::vector<std::string> kinds;
  for (const LayerReport& layer : report.layers) kinds.push_back(layer.name + " " + layer.kind);
  EXPECT_THAT(kinds, ElementsAre("conv Conv2d", "head.fc1 Linear", "head.fc2 Linear"));
  EXPECT_EQ(quantization_map(model).at("head.fc1"), (LayerTypes{"qint8", "none"}));
}

TEST(Script, runs_on_its_quantized_weights_live_and_frozen_alike) {
  for (const QType& qtype : all_qtypes()) {
    SCOPED_TRACE(std::string(qtype.name));
    Script model = net();
    Script rounded = net();
    const at::Tensor exact = run(model).detach();
    run(model);  // the executor has its plan before the weights change
    run(model);
    for (const char* name : {"conv.weight", "head.fc1.weight", "head.fc2.weight"}) {
      torch::NoGradGuard no_grad;
      const at::Tensor weight = parameter(rounded, name);
      weight.copy_(quantal::dequantize(quantize_weight(weight, {.qtype = qtype})));
    }
    quantize(model, {.weights = qtype, .ignore_outside_handles = true});
    reset_fallback_counts();
    const at::Tensor live = run(model).detach();
    for (int i = 0; i < 3; ++i) EXPECT_TRUE(same_bits(run(model), live));
    freeze(model);
    for (int i = 0; i < 3; ++i) EXPECT_TRUE(same_bits(run(model), live));
    EXPECT_THAT(fallback_counts(), IsEmpty());
    EXPECT_LT(relative_error(live, run(rounded)), kFloatRounding);
    EXPECT_GT(relative_error(live, exact), 0);
    EXPECT_LT(relative_error(live, exact), 3 * expected_weight_error(qtype));
  }
}

TEST(Script, patterns_and_errors_work_as_on_other_modules) {
  Script model = net();
  quantize(model, {.weights = qint4, .include = {"head.*"}, .exclude = {"*2"}});
  EXPECT_THAT(quantized_names(model), ElementsAre("head.fc1.weight"));
  EXPECT_TRUE(raises_value_error([&] { quantize(model, {.weights = qint8, .include = {"x"}}); },
                                 "include pattern 'x' matches no layer"));
  Script outside = net();
  const at::Tensor held = parameter(outside, "conv.weight");
  EXPECT_TRUE(raises_value_error([&] { quantize(outside, {.weights = qint8}); },
                                 "something outside the model holds 'conv.weight'"));
}

TEST(Script, trains_and_freezes_to_what_it_trained) {
  Script model = net();
  quantize(model, {.weights = qint8});
  std::vector<at::Tensor> parameters;
  for (const auto& t : model.parameters()) parameters.push_back(t);
  torch::optim::Adam optimizer(parameters, 0.01);
  torch::manual_seed(1);
  const at::Tensor target = torch::randn({3, 5});
  double first = 0, last = 0;
  for (int step = 0; step < 30; ++step) {
    optimizer.zero_grad();
    const at::Tensor loss = torch::mse_loss(run(model), target);
    loss.backward();
    optimizer.step();
    last = loss.item<double>();
    if (step == 0) first = last;
  }
  EXPECT_LT(last, 0.1 * first);
  const at::Tensor live = run(model).detach();
  freeze(model);
  EXPECT_TRUE(same_bits(run(model), live));
}

TEST(Script, calibrates) {
  Script model = net();
  const at::Tensor exact = run(model).detach();
  quantize(model, {.weights = qint8, .activations = qint8, .ignore_outside_handles = true});
  {
    torch::NoGradGuard no_grad;
    Calibration calibration(model);
    run(model);
  }
  const Report found = report(model);
  ASSERT_EQ(found.layers.size(), 3u);
  EXPECT_TRUE(found.layers[0].quantizes_output) << "conv -> relu -> flatten -> linear";
  EXPECT_FALSE(found.layers[1].quantizes_output) << "tanh takes floats";
  EXPECT_NEAR(found.layers[0].input_scale.value() * 127, sample().abs().max().item<double>(), 1e-5);
  const at::Tensor live = run(model).detach();
  freeze(model);
  EXPECT_TRUE(same_bits(run(model), live));
  EXPECT_LT(relative_error(live, exact), 0.03);
}

TEST(Script, clones_are_equal_and_independent) {
  Script model = net();
  quantize(model, {.weights = qint8});
  for (int round = 0; round < 2; ++round) {
    const at::Tensor y = run(model).detach();
    Script copy = quantal::clone(model);
    EXPECT_TRUE(same_bits(run(copy), y));
    EXPECT_EQ(quantized_names(copy), quantized_names(model));
    torch::NoGradGuard no_grad;
    parameter(copy, "conv.bias").add_(1);
    if (round == 0) parameter(copy, "head.fc1.weight").mul_(2);
    EXPECT_FALSE(at::equal(run(copy), y));
    EXPECT_TRUE(same_bits(run(model), y));
    freeze(model);
  }
}

TEST(Script, moves_to_other_dtypes) {
  Script plain = net();
  const at::Tensor plain_exact = run(plain).detach();
  plain.to(torch::kBFloat16);
  const at::Tensor x = sample().to(torch::kBFloat16);
  const double rounding = relative_error(run(plain, x).detach(), plain_exact);
  for (const QType& qtype : all_qtypes()) {
    SCOPED_TRACE(std::string(qtype.name));
    // Shifts are rounded too, a coherent error.
    const double bound = 2 * rounding + (qtype.is_affine() ? 0.05 : 0);
    Script model = net();
    quantize(model, {.weights = qtype});
    const at::Tensor exact = run(model).detach();
    to(model, torch::kBFloat16);
    const at::Tensor live = run(model, x).detach();
    EXPECT_EQ(live.scalar_type(), torch::kBFloat16);
    EXPECT_LT(relative_error(live, exact), bound);
    freeze(model);
    EXPECT_TRUE(same_bits(run(model, x), live));
    to(model, torch::kFloat32);
    EXPECT_LT(relative_error(run(model).detach(), exact), bound);
  }
}

TEST(Script, saving_as_torchscript_says_what_to_use) {
  Script model = net();
  quantize(model, {.weights = qint8});
  std::stringstream stream;
  EXPECT_THAT(error_of([&] { model.save(stream); }), HasSubstr("quantal::save"));
  freeze(model);
  EXPECT_THAT(error_of([&] { model.save(stream); }), HasSubstr("quantal::save"));
}

// torch.nn.LSTM keeps its weights in a list beside the parameters, and forward() reads the list.
TEST(Script, recurrent_weights_are_swapped_in_their_list_too) {
  torch::manual_seed(4);
  Script lstm = module_of("LSTM");
  c10::List<at::Tensor> flat;
  for (const auto& [name, sizes] :
       std::vector<std::pair<std::string, std::vector<std::int64_t>>>{{"weight_ih_l0", {32, 6}},
                                                                      {"weight_hh_l0", {32, 8}},
                                                                      {"bias_ih_l0", {32}},
                                                                      {"bias_hh_l0", {32}}}) {
    const at::Tensor value = torch::rand(sizes) - 0.5;
    lstm.register_parameter(name, value, false);
    flat.push_back(lstm.attr(name).toTensor());
  }
  lstm.register_attribute("_flat_weights", c10::ListType::ofTensors(), flat);
  flat = c10::List<at::Tensor>();
  lstm.define(
      "def forward(self, x):\n"
      "  h = torch.zeros([1, x.size(1), 8])\n"
      "  y, a, b = torch.lstm(x, [h, h], self._flat_weights, True, 1, 0.0, False, False, False)\n"
      "  return y\n");
  torch::manual_seed(7);
  const at::Tensor x = torch::randn({5, 2, 6});
  const at::Tensor exact = run(lstm, x).detach();
  quantize(lstm, {.weights = qint4});
  EXPECT_TRUE(is_live(lstm.attr("_flat_weights").toTensorList().get(0)));
  reset_fallback_counts();
  const at::Tensor live = run(lstm, x).detach();
  EXPECT_GT(relative_error(live, exact), 1e-4);
  EXPECT_LT(relative_error(live, exact), 2 * expected_weight_error(qint4));
  freeze(lstm);
  EXPECT_TRUE(same_bits(run(lstm, x), live));
  EXPECT_THAT(fallback_counts(), IsEmpty());
  Script copy = quantal::clone(lstm);
  EXPECT_TRUE(same_bits(run(copy, x), live));
  EXPECT_TRUE(copy.attr("_flat_weights")
                  .toTensorList()
                  .get(0)
                  .is_same(copy.attr("weight_ih_l0").toTensor()));
}

TEST(Script, a_weight_that_two_submodules_share_stays_shared) {
  torch::manual_seed(4);
  Script first = linear_module(8, 8);
  Script second = linear_module(8, 8);
  second.setattr("weight", first.attr("weight"));
  Script root("__torch__.Shared");
  root.register_module("a", first);
  root.register_module("b", second);
  root.define("def forward(self, x):\n  return self.b.forward(self.a.forward(x))\n");
  quantize(root, {.weights = qint8});
  EXPECT_TRUE(parameter(root, "a.weight").is_same(parameter(root, "b.weight")));
  const at::Tensor live = run(root, torch::ones({2, 8})).detach();
  Script copy = quantal::clone(root);
  EXPECT_TRUE(parameter(copy, "a.weight").is_same(parameter(copy, "b.weight")));
  EXPECT_TRUE(same_bits(run(copy, torch::ones({2, 8})), live));
}

TEST(Script, an_embedding_that_renormalizes_is_left_alone) {
  Script embedding = module_of("Embedding");
  embedding.register_parameter("weight", torch::rand({10, 4}), false);
  embedding.register_attribute("max_norm", c10::FloatType::get(), 1.0);
  EXPECT_TRUE(raises_value_error([&] { quantize(embedding, {.weights = qint8}); }, "max_norm"));
}

TEST(Script, a_frozen_file_says_that_it_has_nothing_to_quantize) {
  Script model = net();
  model.eval();
  std::stringstream file;
  torch::jit::freeze(model).save(file);
  Script frozen = torch::jit::load(file);
  EXPECT_TRUE(raises_value_error([&] { quantize(frozen, {.weights = qint8}); },
                                 "keeps its weights as constants"));
  EXPECT_TRUE(report(frozen).layers.empty());
  EXPECT_TRUE(quantization_map(frozen).empty());
  freeze(frozen);
}

TEST(Script, a_saved_float_model_is_quantized_after_loading) {
  Script model = net();
  std::stringstream file;
  model.save(file);
  Script loaded = torch::jit::load(file);
  quantize(model, {.weights = qint8});
  quantize(loaded, {.weights = qint8});
  EXPECT_TRUE(same_bits(run(loaded), run(model)));
}

}  // namespace
}  // namespace quantal
