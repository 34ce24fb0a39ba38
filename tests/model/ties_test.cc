// Weights that several modules share, modules that occur twice, handles outside the model, and the
// containers that hold modules.
#include "model/models.h"

namespace quantal {
namespace {

namespace nn = torch::nn;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::UnorderedElementsAre;

at::Tensor tokens() { return torch::tensor({{1, 4, 7}, {19, 0, 4}}); }

// A linear whose weight can be another module's, registered or not.
struct HeadImpl : nn::LinearImpl {
  HeadImpl() : LinearImpl(nn::LinearOptions(16, 20).bias(false)) {}
  void register_tied(const at::Tensor& tied) { parameters_["weight"] = weight = tied; }
};
TORCH_MODULE(Head);

enum class Tie { kMember, kRegistered };

// A language model whose head reads the embedding's weight.
struct TiedImpl : nn::Cloneable<TiedImpl> {
  explicit TiedImpl(Tie tie) : tie_(tie) { reset(); }
  void reset() override {
    torch::manual_seed(2);
    embedding = register_module("embedding", nn::Embedding(20, 16));
    body = register_module("body", nn::Linear(16, 16));
    head = register_module("head", Head());
    if (tie_ == Tie::kRegistered) head->register_tied(embedding->weight);
    if (tie_ == Tie::kMember) head->weight = embedding->weight;
  }
  at::Tensor forward(const at::Tensor& x) { return head(torch::relu(body(embedding(x)))); }
  nn::Embedding embedding{nullptr};
  nn::Linear body{nullptr};
  Head head{nullptr};
  Tie tie_;
};
TORCH_MODULE(Tied);

class TiedWeights : public testing::TestWithParam<Tie> {};

TEST_P(TiedWeights, are_quantized_once_and_stay_tied) {
  for (const QType& qtype : all_qtypes()) {
    Tied model(GetParam());
    Tied rounded(GetParam());
    round_weights(*rounded, {"embedding.weight", "body.weight"}, {.qtype = qtype});
    const Report report = quantize(model, {.weights = qtype});
    EXPECT_TRUE(is_live(model->head->weight));
    EXPECT_TRUE(model->head->weight.is_same(model->embedding->weight));
    const at::Tensor live = model->forward(tokens());
    EXPECT_LT(relative_error(live, rounded->forward(tokens())), kFloatRounding);
    freeze(model);
    EXPECT_TRUE(model->head->weight.is_same(model->embedding->weight));
    EXPECT_TRUE(is_frozen(model->head->weight));
    EXPECT_TRUE(same_bits(model->forward(tokens()), live));
    std::vector<std::string> names;
    for (const LayerReport& layer : report.layers) names.push_back(layer.name);
    EXPECT_THAT(names, ElementsAre("embedding", "body", "head"));
    EXPECT_EQ(report.bytes_before, (20 * 16 + 16 * 16 + 16) * 4);
  }
}

TEST_P(TiedWeights, carry_the_activations_of_the_layer_that_has_any) {
  Tied model(GetParam());
  const QuantizeOptions options = {.weights = qint8, .activations = qint8};
  quantize(model, options);
  quantize(model, options);
  EXPECT_EQ(report(model).layers.at(2).activations, qint8);
  EXPECT_EQ(quantization_map(model).at("head"), (LayerTypes{"qint8", "qint8"}));
  EXPECT_EQ(quantization_map(model).at("embedding"), (LayerTypes{"qint8", "none"}));
}

TEST_P(TiedWeights, are_left_alone_when_one_of_their_layers_is) {
  Tied model(GetParam());
  const Report report = quantize(model, {.weights = qint8, .exclude = {"head"}});
  EXPECT_THAT(quantized_parameters(*model), ElementsAre("body.weight"));
  EXPECT_THAT(report.layers.at(0).left_alone,
              HasSubstr("shares its weight with 'head' (excluded by 'head')"));
  EXPECT_TRUE(model->head->weight.is_same(model->embedding->weight));
}

TEST_P(TiedWeights, stay_tied_in_a_clone) {
  Tied model(GetParam());
  quantize(model, {.weights = qint8});
  const size_t held = quantized_parameters(*model).size();
  for (int round = 0; round < 2; ++round) {
    Tied copy = quantal::clone(model);
    EXPECT_TRUE(copy->head->weight.is_same(copy->embedding->weight));
    EXPECT_FALSE(copy->head->weight.is_same(model->head->weight));
    EXPECT_EQ(quantized_parameters(*copy).size(), held) << "an optimizer must step it as often";
    EXPECT_TRUE(same_bits(copy->forward(tokens()), model->forward(tokens())));
    freeze(model);
  }
}

TEST_P(TiedWeights, train_like_the_float_model_does) {
  Tied model(GetParam());
  quantize(model, {.weights = qint8});
  torch::optim::SGD optimizer(model->parameters(), 0.1);
  const at::Tensor before = latent(model->embedding->weight).clone();
  model->forward(tokens()).square().sum().backward();
  const at::Tensor grad = model->embedding->weight.grad().clone();
  optimizer.step();
  const double steps = GetParam() == Tie::kRegistered ? 2 : 1;  // parameters() lists it as often
  EXPECT_LT(relative_error(latent(model->embedding->weight), before - steps * 0.1 * grad), 1e-6);
}

INSTANTIATE_TEST_SUITE_P(, TiedWeights, testing::Values(Tie::kMember, Tie::kRegistered),
                         [](const auto& info) {
                           return info.param == Tie::kMember ? "member" : "registered";
                         });

// A weight that a module of the user's reads by itself.
struct Borrower : nn::Module {
  Borrower() {
    linear = register_module("linear", nn::Linear(8, 8));
    borrowed = register_parameter("borrowed", linear->weight);
  }
  nn::Linear linear{nullptr};
  at::Tensor borrowed;
};

TEST(SharedWeight, of_a_module_that_quantal_does_not_know_is_left_alone) {
  Borrower model;
  EXPECT_TRUE(raises_value_error([&] { quantize(model, {.weights = qint8}); }, "no layer"));
  EXPECT_TRUE(model.linear->weight.is_same(model.borrowed));
}

TEST(SharedModule, is_quantized_once_and_runs_in_both_places) {
  torch::manual_seed(4);
  nn::Linear linear(8, 8);
  nn::Sequential model(linear, nn::ReLU(), linear);
  const at::Tensor x = torch::randn({3, 8});
  const Report report = quantize(model, {.weights = qint8});
  EXPECT_EQ(report.layers.size(), 1u);
  EXPECT_EQ(report.bytes_before, (64 + 8) * 4);
  EXPECT_TRUE(is_live(linear->weight));
  const at::Tensor live = model->forward(x);
  freeze(model);
  EXPECT_TRUE(same_bits(model->forward(x), live));
  const nn::Sequential copy = quantal::clone(model);
  EXPECT_TRUE(same_bits(nn::Sequential(copy)->forward(x), live));
}

TEST(OutsideHandle, such_as_an_optimizer_built_before_is_an_error) {
  nn::Sequential model = two_linears();
  torch::optim::SGD optimizer(model->parameters(), 0.1);
  const auto run = [&] { quantize(model, {.weights = qint8}); };
  EXPECT_TRUE(raises_value_error(run, "something outside the model holds '0.weight'"));
  EXPECT_TRUE(raises_value_error(run, "quantize(model, options, optimizer)"));
  EXPECT_TRUE(quantized_parameters(*model).empty());
  quantize(model, {.weights = qint8}, optimizer);
  EXPECT_EQ(quantized_parameters(*model).size(), 2u);
}

TEST(OutsideHandle, to_a_weight_that_is_left_alone_does_no_harm) {
  nn::Sequential model = two_linears();
  const at::Tensor held = (*model)[0]->named_parameters()["weight"];
  quantize(model, {.weights = qint8, .exclude = {"0"}});
  EXPECT_TRUE(raises_value_error([&] { quantize(model, {.weights = qint8}); }, "'0.weight'"));
  quantize(model, {.weights = qint8, .ignore_outside_handles = true});
  EXPECT_EQ(quantized_parameters(*model).size(), 2u);
}

TEST(Containers, lists_and_dictionaries_are_walked) {
  struct Net : nn::Module {
    Net() {
      list = register_module("list", nn::ModuleList(nn::Linear(4, 4), nn::Conv1d(4, 4, 1)));
      const std::vector<std::pair<std::string, std::shared_ptr<nn::Module>>> entries = {
          {"a", nn::Linear(4, 4).ptr()}, {"b", nn::Sequential(nn::Linear(4, 4)).ptr()}};
      dict = register_module("dict", nn::ModuleDict(entries));
    }
    nn::ModuleList list{nullptr};
    nn::ModuleDict dict{nullptr};
  } net;
  quantize(net, {.weights = qint8});
  EXPECT_THAT(quantized_parameters(net), UnorderedElementsAre("list.0.weight", "list.1.weight",
                                                              "dict.a.weight", "dict.b.0.weight"));
  EXPECT_TRUE(is_live(net.list->ptr<nn::LinearImpl>(0)->weight));
}

TEST(Containers, an_any_module_runs_what_was_swapped_in_it) {
  nn::Linear linear(4, 4);
  nn::AnyModule any(linear);
  const at::Tensor x = torch::ones({2, 4});
  quantize(*any.ptr(), {.weights = qint4});
  freeze(*any.ptr());
  EXPECT_TRUE(is_frozen(linear->weight));
  EXPECT_TRUE(same_bits(any.forward(x), linear->forward(x)));
}

TEST(Containers, the_root_may_be_a_layer_on_the_stack_or_in_a_holder) {
  nn::LinearImpl on_stack(nn::LinearOptions(4, 4));
  quantize(on_stack, {.weights = qint8});
  EXPECT_TRUE(is_live(on_stack.weight));
  EXPECT_EQ(quantization_map(on_stack).at(""), (LayerTypes{"qint8", "none"}));
  nn::Linear held(4, 4);
  const Report report = quantize(held, {.weights = qint8});
  EXPECT_TRUE(is_live(held->weight));
  EXPECT_EQ(report.layers.at(0).name, "");
  EXPECT_EQ(report.layers.at(0).kind, "Linear");
}

TEST(Containers, a_subclass_of_a_layer_is_that_layer) {
  struct Scaled : nn::LinearImpl {
    using LinearImpl::LinearImpl;
    at::Tensor scaled_forward(const at::Tensor& x) { return forward(x) * 2; }
  } scaled(4, 4);
  quantize(scaled, {.weights = qint8});
  EXPECT_TRUE(is_live(scaled.weight));
  EXPECT_EQ(report(scaled).layers.at(0).kind, "Linear");
}

}  // namespace
}  // namespace quantal
