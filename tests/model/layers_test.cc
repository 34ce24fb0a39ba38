// Every kind of layer: what is swapped, what runs, and what comes out.
#include "model/models.h"

namespace quantal {
namespace {

namespace nn = torch::nn;
using Tensors = std::vector<at::Tensor>;
using Names = std::vector<std::string>;

struct LayerCase {
  std::string name;
  std::function<std::shared_ptr<nn::Module>()> make;
  std::function<at::Tensor(nn::Module&)> run;
  /// The typed members that forward() reads, in the order of `weights`.
  std::function<Tensors(nn::Module&)> members;
  Names weights;

  friend void PrintTo(const LayerCase& layer, std::ostream* out) { *out << layer.name; }
};

template <typename Impl, typename Options, typename Run, typename Members>
LayerCase layer(std::string name, Options options, Run run, Members members, Names weights) {
  return {std::move(name), [options] { return std::make_shared<Impl>(options); },
          [run](nn::Module& m) { return run(dynamic_cast<Impl&>(m)); },
          [members](nn::Module& m) { return members(dynamic_cast<Impl&>(m)); }, std::move(weights)};
}

at::Tensor input(at::IntArrayRef sizes) {
  torch::manual_seed(7);
  return torch::randn(sizes);
}

at::Tensor indices(at::IntArrayRef sizes) {
  torch::manual_seed(7);
  return torch::randint(0, 20, sizes, torch::kLong);
}

// A layer with one `weight` that takes one tensor.
template <typename Impl, typename Options>
LayerCase simple(std::string name, Options options, const at::Tensor& x) {
  return layer<Impl>(
      std::move(name), options, [x](Impl& m) { return m.forward(x); },
      [](Impl& m) { return Tensors{m.weight}; }, {"weight"});
}

std::vector<LayerCase> linear_cases() {
  return {
      simple<nn::LinearImpl>("Linear", nn::LinearOptions(24, 16), input({5, 24})),
      simple<nn::LinearImpl>("Linear1d", nn::LinearOptions(24, 16), input({24})),
      simple<nn::LinearImpl>("Linear3d", nn::LinearOptions(24, 16), input({2, 3, 24})),
      simple<nn::LinearImpl>("Linear4dGroups", nn::LinearOptions(256, 16), input({2, 3, 1, 256})),
      simple<nn::LinearImpl>("LinearNoBias", nn::LinearOptions(24, 16).bias(false), input({5, 24})),
      simple<nn::LinearImpl>("LinearNoBias3d", nn::LinearOptions(24, 16).bias(false),
                             input({2, 3, 24})),
      simple<nn::LinearImpl>("LinearStrided", nn::LinearOptions(24, 16), input({24, 5}).t()),
      simple<nn::LinearImpl>("LinearEmptyBatch", nn::LinearOptions(24, 16), input({0, 24})),
      layer<nn::BilinearImpl>(
          "Bilinear", nn::BilinearOptions(12, 10, 8),
          [](nn::BilinearImpl& m) { return m.forward(input({5, 12}), input({5, 10})); },
          [](nn::BilinearImpl& m) { return Tensors{m.weight}; }, {"weight"}),
  };
}

std::vector<LayerCase> conv_cases() {
  return {
      simple<nn::Conv1dImpl>("Conv1d", nn::Conv1dOptions(6, 8, 3).stride(2).padding(1),
                             input({2, 6, 15})),
      simple<nn::Conv2dImpl>("Conv2d", nn::Conv2dOptions(6, 8, 3).groups(2).padding(1),
                             input({2, 6, 9, 7})),
      simple<nn::Conv2dImpl>("Conv2dReflect",
                             nn::Conv2dOptions(6, 8, 3).padding(1).padding_mode(torch::kReflect),
                             input({2, 6, 9, 7})),
      simple<nn::Conv2dImpl>("Conv2dSameNoBias",
                             nn::Conv2dOptions(6, 8, 3).padding(torch::kSame).bias(false),
                             input({2, 6, 9, 7})),
      simple<nn::Conv2dImpl>("Conv2dUnbatched", nn::Conv2dOptions(6, 8, 3).dilation(2),
                             input({6, 9, 7})),
      simple<nn::Conv2dImpl>("Conv2dChannelsLast", nn::Conv2dOptions(6, 8, 3),
                             input({2, 6, 9, 7}).contiguous(at::MemoryFormat::ChannelsLast)),
      simple<nn::Conv3dImpl>("Conv3d", nn::Conv3dOptions(4, 8, 3), input({2, 4, 5, 6, 7})),
      simple<nn::ConvTranspose1dImpl>(
          "ConvTranspose1d", nn::ConvTranspose1dOptions(6, 8, 3).stride(2), input({2, 6, 9})),
      simple<nn::ConvTranspose2dImpl>(
          "ConvTranspose2d", nn::ConvTranspose2dOptions(6, 8, 3).stride(2).output_padding(1),
          input({2, 6, 5, 7})),
      simple<nn::ConvTranspose3dImpl>("ConvTranspose3d", nn::ConvTranspose3dOptions(4, 6, 2),
                                      input({2, 4, 3, 4, 5})),
  };
}

LayerCase bag(std::string name, nn::EmbeddingBagOptions options) {
  return layer<nn::EmbeddingBagImpl>(
      std::move(name), options, [](nn::EmbeddingBagImpl& m) { return m.forward(indices({4, 6})); },
      [](nn::EmbeddingBagImpl& m) { return Tensors{m.weight}; }, {"weight"});
}

std::vector<LayerCase> embedding_cases() {
  return {
      simple<nn::EmbeddingImpl>("Embedding", nn::EmbeddingOptions(20, 16).padding_idx(3),
                                indices({4, 6})),
      simple<nn::EmbeddingImpl>("EmbeddingGroups", nn::EmbeddingOptions(20, 256), indices({4, 6})),
      bag("EmbeddingBagMean", nn::EmbeddingBagOptions(20, 16)),
      bag("EmbeddingBagSum", nn::EmbeddingBagOptions(20, 16).mode(torch::kSum)),
      bag("EmbeddingBagMax", nn::EmbeddingBagOptions(20, 16).mode(torch::kMax)),
      layer<nn::EmbeddingBagImpl>(
          "EmbeddingBagOffsets", nn::EmbeddingBagOptions(20, 16).mode(torch::kSum),
          [](nn::EmbeddingBagImpl& m) {
            return m.forward(indices({7}), torch::tensor({0, 2, 5}), input({7}));
          },
          [](nn::EmbeddingBagImpl& m) { return Tensors{m.weight}; }, {"weight"}),
  };
}

at::Tensor both(const std::tuple<at::Tensor, at::Tensor>& outputs) {
  return torch::cat({std::get<0>(outputs).flatten(), std::get<1>(outputs).flatten()});
}

LayerCase attention(std::string name, nn::MultiheadAttentionOptions options, const at::Tensor& key,
                    const at::Tensor& value, Names weights) {
  using Impl = nn::MultiheadAttentionImpl;
  const bool fused = weights.front() == "in_proj_weight";
  return layer<Impl>(
      std::move(name), options,
      [=](Impl& m) { return both(m.forward(input({3, 2, 16}), key, value)); },
      [fused](Impl& m) {
        return fused
                   ? Tensors{m.in_proj_weight, m.out_proj->weight}
                   : Tensors{m.q_proj_weight, m.k_proj_weight, m.v_proj_weight, m.out_proj->weight};
      },
      std::move(weights));
}

std::vector<LayerCase> transformer_cases() {
  using Encoder = nn::TransformerEncoderLayerImpl;
  using Decoder = nn::TransformerDecoderLayerImpl;
  const Names fused = {"in_proj_weight", "out_proj.weight"};
  return {
      attention("AttentionSelf", nn::MultiheadAttentionOptions(16, 4), input({3, 2, 16}),
                input({3, 2, 16}), fused),
      attention("AttentionSelfNoBias", nn::MultiheadAttentionOptions(16, 4).bias(false),
                input({3, 2, 16}), input({3, 2, 16}), fused),
      attention("AttentionEncoderDecoder", nn::MultiheadAttentionOptions(16, 4), input({5, 2, 16}),
                input({5, 2, 16}), fused),
      attention("AttentionThreeInputs", nn::MultiheadAttentionOptions(16, 4), input({5, 2, 16}),
                input({5, 2, 16}) * 2, fused),
      attention("AttentionSeparate", nn::MultiheadAttentionOptions(16, 4).kdim(12).vdim(12),
                input({5, 2, 12}), input({5, 2, 12}),
                {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"}),
      layer<Encoder>(
          "TransformerEncoderLayer",
          nn::TransformerEncoderLayerOptions(16, 4).dim_feedforward(32).dropout(0),
          [](Encoder& m) { return m.forward(input({3, 2, 16})); },
          [](Encoder& m) {
            return Tensors{m.self_attn->in_proj_weight, m.self_attn->out_proj->weight,
                           m.linear1->weight, m.linear2->weight};
          },
          {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight",
           "linear2.weight"}),
      layer<Decoder>(
          "TransformerDecoderLayer",
          nn::TransformerDecoderLayerOptions(16, 4).dim_feedforward(32).dropout(0),
          [](Decoder& m) { return m.forward(input({3, 2, 16}), input({5, 2, 16})); },
          [](Decoder& m) {
            return Tensors{m.self_attn->in_proj_weight, m.multihead_attn->in_proj_weight,
                           m.linear1->weight, m.linear2->weight};
          },
          {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "multihead_attn.in_proj_weight",
           "multihead_attn.out_proj.weight", "linear1.weight", "linear2.weight"}),
  };
}

template <typename Impl>
Tensors only_weights(Impl& rnn, size_t a_layer) {
  Tensors weights;
  const Tensors all = rnn.all_weights();
  for (const at::Tensor& t : all) {
    if (t.dim() == 2) weights.push_back(t);
  }
  EXPECT_EQ(all.size() % a_layer, 0u);
  return weights;
}

std::vector<LayerCase> recurrent_cases() {
  const Names two = {"weight_ih_l0", "weight_hh_l0"};
  const Names four = {"weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse",
                      "weight_hh_l0_reverse"};
  const auto lstm = [](nn::LSTMImpl& m) { return std::get<0>(m.forward(input({5, 2, 12}))); };
  const auto lstm_weights = [](nn::LSTMImpl& m) { return only_weights(m, 1); };
  const auto rnn = [](nn::RNNImpl& m) { return std::get<0>(m.forward(input({5, 2, 12}))); };
  const auto rnn_weights = [](nn::RNNImpl& m) { return only_weights(m, 1); };
  return {
      layer<nn::LSTMImpl>("LSTM", nn::LSTMOptions(12, 16), lstm, lstm_weights, two),
      layer<nn::LSTMImpl>("LSTMBidirectional", nn::LSTMOptions(12, 16).bidirectional(true), lstm,
                          lstm_weights, four),
      layer<nn::LSTMImpl>("LSTMNoBias", nn::LSTMOptions(12, 16).bias(false), lstm, lstm_weights,
                          two),
      layer<nn::LSTMImpl>("LSTMProjected", nn::LSTMOptions(12, 16).proj_size(4), lstm, lstm_weights,
                          {"weight_ih_l0", "weight_hh_l0", "weight_hr_l0"}),
      layer<nn::LSTMImpl>("LSTMBatchFirst", nn::LSTMOptions(12, 16).num_layers(2).batch_first(true),
                          lstm, lstm_weights,
                          {"weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"}),
      layer<nn::LSTMImpl>(
          "LSTMPacked", nn::LSTMOptions(12, 16),
          [](nn::LSTMImpl& m) {
            const auto packed =
                nn::utils::rnn::pack_padded_sequence(input({5, 2, 12}), torch::tensor({5, 3}));
            return std::get<0>(m.forward_with_packed_input(packed)).data();
          },
          lstm_weights, two),
      layer<nn::GRUImpl>(
          "GRU", nn::GRUOptions(12, 16),
          [](nn::GRUImpl& m) { return std::get<0>(m.forward(input({5, 2, 12}))); },
          [](nn::GRUImpl& m) { return only_weights(m, 4); }, two),
      layer<nn::RNNImpl>("RNNTanh", nn::RNNOptions(12, 16), rnn, rnn_weights, two),
      layer<nn::RNNImpl>("RNNRelu", nn::RNNOptions(12, 16).nonlinearity(torch::kReLU), rnn,
                         rnn_weights, two),
      layer<nn::LSTMCellImpl>(
          "LSTMCell", nn::LSTMCellOptions(12, 16),
          [](nn::LSTMCellImpl& m) { return both(m.forward(input({2, 12}))); },
          [](nn::LSTMCellImpl& m) { return Tensors{m.weight_ih, m.weight_hh}; },
          {"weight_ih", "weight_hh"}),
      layer<nn::GRUCellImpl>(
          "GRUCell", nn::GRUCellOptions(12, 16),
          [](nn::GRUCellImpl& m) { return m.forward(input({2, 12})); },
          [](nn::GRUCellImpl& m) { return Tensors{m.weight_ih, m.weight_hh}; },
          {"weight_ih", "weight_hh"}),
      layer<nn::RNNCellImpl>(
          "RNNCell", nn::RNNCellOptions(12, 16).bias(false),
          [](nn::RNNCellImpl& m) { return m.forward(input({2, 12})); },
          [](nn::RNNCellImpl& m) { return Tensors{m.weight_ih, m.weight_hh}; },
          {"weight_ih", "weight_hh"}),
  };
}

std::vector<LayerCase> all_cases() {
  std::vector<LayerCase> cases;
  for (auto& some :
       {linear_cases(), conv_cases(), embedding_cases(), transformer_cases(), recurrent_cases()}) {
    cases.insert(cases.end(), some.begin(), some.end());
  }
  return cases;
}

std::shared_ptr<nn::Module> make(const LayerCase& layer) {
  torch::manual_seed(3);
  return layer.make();
}

class EveryLayer : public testing::TestWithParam<LayerCase> {};

TEST_P(EveryLayer, is_swapped_in_its_member_and_its_parameter) {
  const LayerCase& layer = GetParam();
  const auto module = make(layer);
  quantize(*module, {.weights = qint8});
  auto parameters = module->named_parameters();
  EXPECT_THAT(quantized_parameters(*module), testing::UnorderedElementsAreArray(layer.weights));
  for (const std::string& name : layer.weights) {
    EXPECT_TRUE(is_live(parameters[name])) << name;
    EXPECT_TRUE(parameters[name].requires_grad()) << name;
  }
  Tensors held;
  for (const auto& parameter : parameters) held.push_back(parameter.value());
  for (const at::Tensor& member : layer.members(*module)) {
    EXPECT_TRUE(is_live(member));
    EXPECT_TRUE(std::any_of(held.begin(), held.end(),
                            [&](const at::Tensor& t) { return t.is_same(member); }));
  }
}

// torch runs an LSTM that needs no gradients by another kernel, with other rounding.
at::Tensor run_without_gradients(const LayerCase& layer, nn::Module& module) {
  torch::NoGradGuard no_grad;
  return layer.run(module);
}

TEST_P(EveryLayer, runs_on_its_quantized_weights_live_and_frozen_alike) {
  const LayerCase& layer = GetParam();
  for (const QType& qtype : all_qtypes()) {
    SCOPED_TRACE(std::string(qtype.name));
    const auto module = make(layer);
    const at::Tensor exact = layer.run(*module).detach();
    const auto rounded = make(layer);
    round_weights(*rounded, layer.weights, {.qtype = qtype});

    quantize(*module, {.weights = qtype});
    reset_fallback_counts();
    const at::Tensor live = layer.run(*module);
    const at::Tensor live_no_grad = run_without_gradients(layer, *module);
    freeze(*module);
    const at::Tensor frozen = layer.run(*module);
    const at::Tensor frozen_no_grad = run_without_gradients(layer, *module);
    EXPECT_THAT(fallback_counts(), testing::IsEmpty());

    EXPECT_TRUE(live.requires_grad());
    EXPECT_TRUE(same_bits(live, frozen));
    EXPECT_TRUE(same_bits(live_no_grad, frozen_no_grad));
    {
      c10::InferenceMode inference;
      EXPECT_TRUE(same_bits(layer.run(*module), frozen_no_grad));
    }
    if (exact.numel() == 0) continue;
    EXPECT_LT(relative_error(frozen, layer.run(*rounded)), kFloatRounding);
    EXPECT_LT(relative_error(frozen_no_grad, run_without_gradients(layer, *rounded)),
              kFloatRounding);
    EXPECT_GT(relative_error(frozen, exact), 0);
    EXPECT_LT(relative_error(frozen, exact), 2 * expected_weight_error(qtype));
  }
}

TEST_P(EveryLayer, sends_gradients_straight_through) {
  const LayerCase& layer = GetParam();
  const auto module = make(layer);
  const auto rounded = make(layer);
  round_weights(*rounded, layer.weights, {.qtype = qint4});
  // Not the sum of squares, which a LayerNorm at the end makes a constant.
  const auto loss = [&](nn::Module& m) {
    const at::Tensor y = layer.run(m);
    return (y * torch::linspace(-1, 1, y.numel()).view_as(y)).sum();
  };
  loss(*rounded).backward();
  quantize(*module, {.weights = qint4});
  loss(*module).backward();
  auto wanted = rounded->named_parameters();
  for (const auto& parameter : module->named_parameters()) {
    ASSERT_TRUE(parameter.value().grad().defined()) << parameter.key();
    ASSERT_TRUE(wanted[parameter.key()].grad().defined()) << parameter.key();
    if (wanted[parameter.key()].grad().norm().item<double>() == 0) continue;
    EXPECT_LT(relative_error(parameter.value().grad(), wanted[parameter.key()].grad()),
              4 * kFloatRounding)
        << parameter.key();
  }
}

INSTANTIATE_TEST_SUITE_P(, EveryLayer, testing::ValuesIn(all_cases()),
                         [](const auto& info) { return info.param.name; });

TEST(LayerNorm, is_left_alone_when_only_weights_are_quantized) {
  nn::Sequential model(nn::Linear(8, 8), nn::LayerNorm(nn::LayerNormOptions({8})));
  const Report report = quantize(model, {.weights = qint8});
  EXPECT_THAT(quantized_parameters(*model), testing::ElementsAre("0.weight"));
  EXPECT_EQ(report.layers.at(1).left_alone, "has activations to quantize only");
}

TEST(LayerNorm, keeps_its_float_weight_and_carries_activations) {
  nn::LayerNorm norm(nn::LayerNormOptions({8}));
  const at::Tensor x = input({3, 8});
  const at::Tensor exact = norm->forward(x).detach();
  const Report report = quantize(norm, {.weights = qint8, .activations = qint8});
  EXPECT_FALSE(is_quantized(norm->weight));
  EXPECT_EQ(report.layers.at(0).activations, qint8);
  EXPECT_EQ(report.layers.at(0).weights, std::nullopt);
  EXPECT_EQ(quantization_map(norm).at(""), (LayerTypes{"none", "qint8"}));
  EXPECT_TRUE(same_bits(norm->forward(x), exact)) << "not calibrated: nothing to quantize with";
  freeze(norm);
  EXPECT_TRUE(same_bits(norm->forward(x), exact));
}

TEST(LayerNorm, without_affine_has_nothing_to_carry_activations_and_runs_as_it_is) {
  nn::Sequential model(nn::Linear(8, 8),
                       nn::LayerNorm(nn::LayerNormOptions({8}).elementwise_affine(false)));
  quantize(model, {.weights = qint8, .activations = qint8});
  freeze(model);
  const at::Tensor y = model->forward(input({3, 8}));
  EXPECT_LT(relative_error(y.square().mean(), torch::ones({})), 1e-3) << "still normalizes";
  EXPECT_EQ(quantization_map(model).count("1"), 0u);
}

TEST(Embedding, that_renormalizes_its_rows_is_left_alone) {
  nn::Sequential model(nn::Embedding(nn::EmbeddingOptions(20, 8).max_norm(1.0)), nn::Linear(8, 4));
  const Report report = quantize(model, {.weights = qint8});
  EXPECT_THAT(quantized_parameters(*model), testing::ElementsAre("1.weight"));
  EXPECT_THAT(report.layers.at(0).left_alone, testing::HasSubstr("max_norm"));
  freeze(model);
  EXPECT_EQ(model->forward(indices({3})).sizes(), at::IntArrayRef({3, 4}));
}

TEST(EmbeddingBag, that_renormalizes_its_rows_is_left_alone) {
  nn::EmbeddingBag bag(nn::EmbeddingBagOptions(20, 8).max_norm(1.0));
  EXPECT_TRUE(raises_value_error([&] { quantize(bag, {.weights = qint8}); }, "no layer"));
}

TEST(Embedding, trains_with_sparse_gradients) {
  nn::Embedding embedding(nn::EmbeddingOptions(20, 8).sparse(true));
  quantize(embedding, {.weights = qint8});
  torch::optim::SGD optimizer(embedding->parameters(), 0.5);
  const at::Tensor before = latent(embedding->weight).clone();
  embedding->forward(torch::tensor({2, 5, 2})).sum().backward();
  EXPECT_TRUE(embedding->weight.grad().is_sparse());
  optimizer.step();
  at::Tensor expected = before.clone();
  expected[2] -= 1.0;
  expected[5] -= 0.5;
  EXPECT_TRUE(same_bits(latent(embedding->weight), expected));
}

}  // namespace
}  // namespace quantal
