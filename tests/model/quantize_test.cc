// Which layers quantize() takes, and what it does when it cannot.
#include <c10/core/InferenceMode.h>

#include "model/models.h"

namespace quantal {
namespace {

namespace nn = torch::nn;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::UnorderedElementsAre;

// An encoder of two blocks and a head, as users nest modules.
struct BlockImpl : nn::Module {
  BlockImpl() {
    linear1 = register_module("linear1", nn::Linear(16, 32));
    linear2 = register_module("linear2", nn::Linear(32, 16));
  }
  at::Tensor forward(const at::Tensor& x) { return linear2(torch::relu(linear1(x))) + x; }
  nn::Linear linear1{nullptr}, linear2{nullptr};
};
TORCH_MODULE(Block);

struct Net : nn::Module {
  Net() {
    torch::manual_seed(2);
    encoder = register_module("encoder", nn::Sequential(Block(), nn::ReLU(), Block()));
    norm = register_module("norm", nn::LayerNorm(nn::LayerNormOptions({16})));
    head = register_module("head", nn::Linear(16, 4));
  }
  at::Tensor forward(const at::Tensor& x) { return head(norm(encoder->forward(x))); }
  nn::Sequential encoder{nullptr};
  nn::LayerNorm norm{nullptr};
  nn::Linear head{nullptr};
};

at::Tensor sample(at::IntArrayRef sizes = {3, 16}) {
  torch::manual_seed(7);
  return torch::randn(sizes);
}

// quantize() raises `text` and leaves every tensor of the model in place.
void expect_refused(nn::Module& model, const QuantizeOptions& options, const std::string& text) {
  const std::vector<at::Tensor> before = model.parameters();
  std::vector<at::Tensor> values;
  for (const at::Tensor& t : before) values.push_back(t.detach().clone());
  QuantizeOptions lenient = options;
  lenient.ignore_outside_handles = true;
  EXPECT_TRUE(raises_value_error([&] { quantize(model, lenient); }, text));
  const std::vector<at::Tensor> after = model.parameters();
  ASSERT_EQ(after.size(), before.size());
  for (size_t i = 0; i < before.size(); ++i) {
    EXPECT_TRUE(after[i].is_same(before[i]));
    EXPECT_TRUE(after[i].detach().allclose(values[i], 0, 0, /*equal_nan=*/true));
  }
}

TEST(QuantizeOptions, need_a_qtype_for_weights_or_activations) {
  Net net;
  expect_refused(net, {}, "expected a qtype for weights, activations or both");
  expect_refused(net, {.weights = qint8, .activations = qint4}, "expected an 8-bit qtype");
}

TEST(QuantizeOptions, patterns_match_dotted_names) {
  Net net;
  quantize(net, {.weights = qint8, .include = {"encoder.*.linear1", "hea?"}});
  EXPECT_THAT(
      quantized_parameters(net),
      UnorderedElementsAre("encoder.0.linear1.weight", "encoder.2.linear1.weight", "head.weight"));
}

TEST(QuantizeOptions, exclude_wins_over_include) {
  Net net;
  const Report report =
      quantize(net, {.weights = qint8, .include = {"encoder.*"}, .exclude = {"*.2.*"}});
  EXPECT_THAT(quantized_parameters(net),
              UnorderedElementsAre("encoder.0.linear1.weight", "encoder.0.linear2.weight"));
  std::map<std::string, std::string> reasons;
  for (const LayerReport& layer : report.layers) reasons[layer.name] = layer.left_alone;
  EXPECT_EQ(reasons["encoder.0.linear1"], "");
  EXPECT_EQ(reasons["encoder.2.linear1"], "excluded by '*.2.*'");
  EXPECT_EQ(reasons["head"], "matches no include pattern");
}

TEST(QuantizeOptions, a_pattern_that_matches_no_layer_is_an_error) {
  Net net;
  expect_refused(net, {.weights = qint8, .include = {"head", "encodr.*"}},
                 "include pattern 'encodr.*' matches no layer");
  expect_refused(net, {.weights = qint8, .exclude = {"Head"}},
                 "exclude pattern 'Head' matches no layer");
  expect_refused(net, {.weights = qint8, .include = {"encoder.1"}}, "'encoder.1'");
}

TEST(QuantizeOptions, layers_take_different_qtypes_call_by_call) {
  Net net;
  quantize(net, {.weights = qint4, .include = {"encoder.*"}});
  quantize(net, {.weights = qint8, .exclude = {"encoder.*"}});
  const auto map = quantization_map(net);
  EXPECT_EQ(map.at("encoder.0.linear1"), (LayerTypes{"qint4", "none"}));
  EXPECT_EQ(map.at("head"), (LayerTypes{"qint8", "none"}));
  EXPECT_EQ(map.size(), 5u);
}

TEST(Quantize, refuses_a_model_without_layers) {
  nn::Sequential model(nn::ReLU(), nn::BatchNorm1d(4));
  expect_refused(*model, {.weights = qint8}, "the model has no layer to quantize");
}

TEST(Quantize, refuses_non_finite_weights_naming_the_first) {
  Net net;
  torch::NoGradGuard no_grad;
  net.head->weight[2][1] = std::numeric_limits<float>::quiet_NaN();
  dynamic_cast<BlockImpl&>(*net.encoder->ptr(2)).linear1->weight[3][5] =
      std::numeric_limits<float>::infinity();
  expect_refused(net, {.weights = qint8},
                 "'encoder.2.linear1.weight', got NaN or Inf at index "
                 "[3, 5]");
}

TEST(Quantize, leaves_weights_alone_that_are_not_of_a_supported_dtype) {
  nn::Sequential model(nn::Linear(8, 8), nn::Linear(8, 8));
  model[0]->to(torch::kComplexFloat);
  const Report report = quantize(model, {.weights = qint8});
  EXPECT_THAT(quantized_parameters(*model), ElementsAre("1.weight"));
  EXPECT_THAT(report.layers.at(0).left_alone, HasSubstr("ComplexFloat"));
  nn::Linear narrow(8, 8);
  narrow->to(torch::kFloat8_e4m3fn);
  expect_refused(*narrow, {.weights = qint8}, "no layer");
}

TEST(Quantize, takes_every_floating_point_dtype) {
  for (const auto dtype : {torch::kFloat64, torch::kFloat32, torch::kBFloat16, torch::kFloat16}) {
    nn::Linear linear(16, 4);
    linear->to(dtype);
    const at::Tensor exact = linear->forward(sample().to(dtype));
    quantize(linear, {.weights = qint8});
    const at::Tensor live = linear->forward(sample().to(dtype));
    freeze(linear);
    const at::Tensor frozen = linear->forward(sample().to(dtype));
    EXPECT_EQ(frozen.scalar_type(), dtype);
    EXPECT_TRUE(same_bits(live, frozen));
    EXPECT_LT(relative_error(frozen, exact), 0.02);
  }
}

TEST(Quantize, takes_layers_without_elements) {
  for (const auto& [in, out] : {std::pair{4, 0}, {0, 4}}) {
    nn::Linear linear(4, 4);
    linear->weight.set_data(torch::zeros({out, in}));
    linear->bias.set_data(torch::zeros({out}));
    quantize(linear, {.weights = qint8});
    freeze(linear);
    EXPECT_TRUE(same_bits(linear->forward(torch::ones({2, in})), torch::zeros({2, out})));
  }
}

// Writes, quantizes and freezes `weight` in a layer of its own.
template <typename Layer>
at::Tensor frozen_value(Layer layer, const at::Tensor& weight, const QType& qtype) {
  layer->weight.set_data(weight);
  quantize(layer, {.weights = qtype, .ignore_outside_handles = true});
  {
    torch::NoGradGuard no_grad;
    layer->weight[1].mul_(3);
  }
  const at::Tensor live = quantal::dequantize(layer->weight).detach();
  freeze(layer);
  EXPECT_TRUE(same_bits(quantal::dequantize(layer->weight), live));
  return live;
}

TEST(Quantize, takes_strided_weights_as_what_they_show) {
  torch::manual_seed(5);
  const at::Tensor matrix = torch::randn({16, 12}).t().slice(0, 0, 12, 2);
  const at::Tensor kernel = torch::randn({6, 4, 3, 3}).contiguous(at::MemoryFormat::ChannelsLast);
  const auto dense = [](const at::Tensor& t) { return t.clone(at::MemoryFormat::Contiguous); };
  for (const QType& qtype : all_qtypes()) {
    const at::Tensor rows = dense(matrix), filters = dense(kernel);
    EXPECT_TRUE(same_bits(frozen_value(nn::Linear(16, 6), matrix, qtype),
                          frozen_value(nn::Linear(16, 6), rows, qtype)));
    const nn::Conv2dOptions options(4, 6, 3);
    EXPECT_TRUE(same_bits(
        frozen_value(nn::Conv2d(options), kernel.clone(at::MemoryFormat::ChannelsLast), qtype),
        frozen_value(nn::Conv2d(options), filters, qtype)));
  }
}

// The group size that layers get by optimum-quanto's rule.
TEST(GroupSize, follows_the_row) {
  for (const auto& [row, group] :
       {std::pair{256, 128}, {192, 96}, {320, 64}, {160, 32}, {128, 0}, {129, 0}, {100, 0}}) {
    nn::Linear linear(row, 4);
    quantize(linear, {.weights = qint4});
    EXPECT_EQ(report(linear).layers.at(0).group_size, group) << row;
  }
}

TEST(GroupSize, can_be_asked_for) {
  nn::Linear linear(96, 4);
  quantize(linear, {.weights = qint4, .group_size = 32});
  EXPECT_EQ(parts(linear->weight).group_size, 32);
  EXPECT_EQ(parts(linear->weight).scale.sizes(), at::IntArrayRef({12, 1}));
}

TEST(GroupSize, must_divide_the_row_unless_a_short_group_is_allowed) {
  nn::Linear linear(100, 4);
  expect_refused(*linear, {.weights = qint4, .group_size = 32},
                 "'weight': expected a group size that divides the row of 100 elements");
  quantize(linear, {.weights = qint4, .group_size = 32, .allow_short_group = true});
  EXPECT_EQ(parts(linear->weight).scale.sizes(), at::IntArrayRef({16, 1}));
  const at::Tensor live = linear->forward(sample({2, 100}));
  freeze(linear);
  EXPECT_TRUE(same_bits(linear->forward(sample({2, 100})), live));
}

TEST(GroupSize, is_refused_by_8_bit_types_and_when_negative) {
  nn::Linear linear(128, 4);
  expect_refused(*linear, {.weights = qint8, .group_size = 64}, "expected group size 0 for qint8");
  expect_refused(*linear, {.weights = qint4, .group_size = -1}, "got -1");
}

TEST(Quantizer, hqq_lowers_the_error_of_a_model) {
  torch::manual_seed(5);
  nn::Linear linear(256, 32);
  {
    torch::NoGradGuard no_grad;
    linear->weight.copy_(torch::randn_like(linear->weight));
  }
  const auto error = [&](std::shared_ptr<const Quantizer> quantizer) {
    nn::Linear copy(256, 32);
    copy->weight.set_data(linear->weight.detach().clone());
    quantize(copy, {.weights = qint2, .quantizer = std::move(quantizer)});
    freeze(copy);
    return (quantal::dequantize(copy->weight) - linear->weight).abs().mean().item<double>();
  };
  EXPECT_LT(error(hqq_quantizer()), error(max_quantizer()));
}

TEST(Quantizer, that_does_not_support_the_qtype_is_an_error) {
  nn::Linear linear(16, 4);
  expect_refused(*linear, {.weights = qint8, .quantizer = hqq_quantizer()},
                 "'weight': quantizer 'hqq' does not support qint8");
}

TEST(QuantizeTwice, changes_nothing_where_the_options_are_the_same) {
  Net net;
  const QuantizeOptions options = {.weights = qint4, .activations = qint8};
  quantize(net, options);
  const at::Tensor weight = net.head->weight;
  const at::Tensor y = net.forward(sample());
  const Report again = quantize(net, options);
  EXPECT_TRUE(net.head->weight.is_same(weight));
  EXPECT_TRUE(same_bits(net.forward(sample()), y));
  EXPECT_EQ(again.layers.size(), report(net).layers.size());
  freeze(net);
  quantize(net, options);
  EXPECT_TRUE(is_frozen(net.head->weight));
  EXPECT_TRUE(same_bits(net.forward(sample()), y));
}

TEST(QuantizeTwice, otherwise_is_an_error_that_tells_what_is_there) {
  nn::Linear linear(256, 4);
  quantize(linear, {.weights = qint4});
  const std::string there = "'weight' is already quantized in another way (weights qint4, ";
  expect_refused(*linear, {.weights = qint8}, there);
  expect_refused(*linear, {.weights = qint4, .activations = qint8}, there);
  expect_refused(*linear, {.weights = qint4, .group_size = 32}, there);
  expect_refused(*linear, {.activations = qint8}, there);
  freeze(linear);
  expect_refused(*linear, {.weights = qint2}, there);
}

TEST(Freeze, twice_and_on_a_float_model_does_nothing) {
  Net net;
  const at::Tensor exact = net.forward(sample()).detach();
  freeze(net);
  EXPECT_TRUE(same_bits(net.forward(sample()), exact));
  quantize(net, {.weights = qint8});
  const at::Tensor weight = net.head->weight;
  freeze(net);
  EXPECT_TRUE(net.head->weight.is_same(weight));
  EXPECT_TRUE(is_frozen(weight));
  EXPECT_FALSE(weight.requires_grad());
  const void* codes = parts(weight).data.const_data_ptr();
  freeze(net);
  EXPECT_EQ(parts(net.head->weight).data.const_data_ptr(), codes);
}

TEST(Freeze, refuses_non_finite_weights_with_the_model_as_it_was) {
  Net net;
  quantize(net, {.weights = qint8});
  {
    torch::NoGradGuard no_grad;
    latent(net.head->weight)[1][2] = std::numeric_limits<float>::quiet_NaN();
  }
  EXPECT_TRUE(raises_value_error([&] { freeze(net); }, "'head.weight'"));
  for (const auto& name : quantized_parameters(net)) {
    EXPECT_TRUE(is_live(net.named_parameters()[name])) << name;
  }
}

TEST(InferenceMode, may_be_on_when_a_model_is_quantized_frozen_and_run) {
  for (const QType& qtype : all_qtypes()) {
    Net net;
    Net twin;
    quantize(twin, {.weights = qtype});
    const at::Tensor expected = twin.forward(sample());
    {
      c10::InferenceMode inference;
      quantize(net, {.weights = qtype});
      EXPECT_TRUE(same_bits(net.forward(sample()), expected));
      freeze(net);
      EXPECT_TRUE(same_bits(net.forward(sample()), expected));
    }
    EXPECT_TRUE(same_bits(net.forward(sample()), expected)) << "and the mode may end";
  }
}

TEST(InferenceMode, may_be_on_when_a_model_is_made) {
  c10::InferenceMode inference;
  Net net;
  Net twin;
  quantize(twin, {.weights = qint4});
  quantize(net, {.weights = qint4});
  freeze(net);
  EXPECT_TRUE(same_bits(net.forward(sample()), twin.forward(sample())));
}

TEST(NoGrad, keeps_which_weights_require_grad) {
  torch::NoGradGuard no_grad;
  Net net;
  net.head->weight.set_requires_grad(false);
  quantize(net, {.weights = qint8});
  EXPECT_FALSE(net.head->weight.requires_grad());
  EXPECT_TRUE(net.named_parameters()["encoder.0.linear1.weight"].requires_grad());
}

TEST(Quantize, keeps_gradients_and_ignores_the_graph_that_made_them) {
  nn::Linear linear(16, 4);
  const at::Tensor loss = linear->forward(sample()).sum();
  loss.backward();
  const at::Tensor grad = linear->weight.grad();
  quantize(linear, {.weights = qint8});
  EXPECT_TRUE(linear->weight.grad().is_same(grad));
}

}  // namespace
}  // namespace quantal
