// What report() says of a model, against figures worked out by hand.
#include <sstream>

#include "model/models.h"

#include <quantal/calibration.h>

namespace quantal {
namespace {

namespace nn = torch::nn;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::StartsWith;

nn::Sequential model() {
  torch::manual_seed(3);
  return nn::Sequential(nn::Conv2d(nn::Conv2dOptions(3, 4, 3)), nn::BatchNorm2d(4), nn::Flatten(),
                        nn::Linear(256, 16), nn::LayerNorm(nn::LayerNormOptions({16})),
                        nn::Linear(nn::LinearOptions(16, 2).bias(false)), nn::ReLU());
}

std::vector<std::string> names(const Report& report) {
  std::vector<std::string> all;
  for (const LayerReport& layer : report.layers) all.push_back(layer.name);
  return all;
}

TEST(Report, of_a_float_model_lists_what_could_be_quantized) {
  const Report found = report(model());
  EXPECT_THAT(names(found), ElementsAre("0", "1", "3", "4", "5"));
  const LayerReport& conv = found.layers[0];
  EXPECT_EQ(conv.kind, "Conv2d");
  EXPECT_EQ(conv.weights, std::nullopt);
  EXPECT_EQ(conv.left_alone, "not quantized");
  EXPECT_EQ(conv.bytes_before, 4 * 27 * 4);
  EXPECT_EQ(conv.bytes_after, conv.bytes_before);
  EXPECT_EQ(found.layers[1].kind, "BatchNorm2d");
  EXPECT_EQ(found.layers[1].left_alone, "no quantized kernel for its parameters");
  EXPECT_EQ(found.layers[1].bytes_before, 2 * 4 * 4);
  EXPECT_EQ(found.bytes_before, found.bytes_after);
  // conv; batch norm's four vectors and int64 counter; linear; layer norm; linear.
  EXPECT_EQ(found.bytes_before, 4 * ((108 + 4) + 16 + (4096 + 16) + 32 + 32) + 8);
}

TEST(Report, counts_the_bytes_of_codes_scales_and_shifts) {
  struct Expected {
    QType qtype;
    std::int64_t group_size;
    std::int64_t bytes;  // of Linear(256, 16)
  };
  for (const Expected& expected :
       std::initializer_list<Expected>{{qint8, 0, 4096 + 16 * 4},
                                       {qfloat8, 0, 4096 + 16 * 4},
                                       {qint4, 128, 4096 / 2 + 2 * 32 * 4},
                                       {qint2, 128, 4096 / 4 + 2 * 32 * 4}}) {
    nn::Sequential net = model();
    const std::int64_t before = report(net).bytes_before;
    const Report live = quantize(net, {.weights = expected.qtype, .include = {"3"}});
    freeze(net);
    for (const Report& found : {live, report(net)}) {
      const LayerReport& linear = found.layers.at(2);
      EXPECT_EQ(linear.weights, expected.qtype);
      EXPECT_EQ(linear.group_size, expected.group_size);
      EXPECT_EQ(linear.bytes_before, 4096 * 4);
      EXPECT_EQ(linear.bytes_after, expected.bytes);
      EXPECT_EQ(linear.left_alone, "");
      EXPECT_EQ(found.bytes_before, before);
      EXPECT_EQ(found.bytes_after, before - 4096L * 4 + expected.bytes);
    }
    EXPECT_FALSE(live.layers.at(2).frozen);
    EXPECT_TRUE(report(net).layers.at(2).frozen);
  }
}

TEST(Report, knows_the_signal_to_noise_ratio) {
  nn::Linear linear(2, 2);
  {
    torch::NoGradGuard no_grad;
    // Row 0: scale 1, errors 0 and 0.25. Row 1: scale 2, errors 0 and 0.5.
    linear->weight.copy_(torch::tensor({{127.0, 3.25}, {-254.0, 4.5}}));
  }
  quantize(linear, {.weights = qint8});
  const double signal = 127.0 * 127 + 3.25 * 3.25 + 254.0 * 254 + 4.5 * 4.5;
  const double noise = 0.25 * 0.25 + 0.5 * 0.5;
  EXPECT_NEAR(report(linear).layers.at(0).snr_db.value(), 10 * std::log10(signal / noise), 1e-6);
  freeze(linear);
  EXPECT_NEAR(report(linear).layers.at(0).snr_db.value(), 10 * std::log10(signal / noise), 1e-6);
}

TEST(Report, has_no_ratio_where_nothing_is_lost) {
  nn::Linear linear(2, 1);
  linear->weight.set_data(torch::tensor({{127.0f, 3.0f}}));
  EXPECT_EQ(quantize(linear, {.weights = qint8}).layers.at(0).snr_db, std::nullopt);
}

TEST(Report, follows_training) {
  nn::Linear linear(16, 4);
  const double before = quantize(linear, {.weights = qint4}).layers.at(0).snr_db.value();
  {
    torch::NoGradGuard no_grad;
    linear->weight[0][0] = 100;
  }
  EXPECT_NE(report(linear).layers.at(0).snr_db.value(), before);
}

TEST(Report, gives_the_reason_of_every_layer_that_was_left_alone) {
  nn::Sequential net = model();
  const Report found = quantize(net, {.weights = qint8, .exclude = {"5"}});
  std::vector<std::string> reasons;
  for (const LayerReport& layer : found.layers) reasons.push_back(layer.left_alone);
  EXPECT_THAT(reasons, ElementsAre("", "no quantized kernel for its parameters", "",
                                   "has activations to quantize only", "excluded by '5'"));
}

TEST(Report, names_the_weight_where_a_module_has_several) {
  nn::LSTM lstm(8, 8);
  const Report found = quantize(lstm, {.weights = qint8});
  EXPECT_THAT(names(found), ElementsAre("weight_ih_l0", "weight_hh_l0"));
  nn::TransformerEncoderLayer layer(nn::TransformerEncoderLayerOptions(16, 4));
  const Report encoder = quantize(layer, {.weights = qint8});
  EXPECT_THAT(names(encoder), testing::Contains("self_attn.in_proj_weight"));
  EXPECT_THAT(names(encoder), testing::Contains("self_attn.out_proj"));
  for (const LayerReport& found : encoder.layers) {
    if (found.kind != "MultiheadAttention") continue;
    EXPECT_EQ(found.bytes_before, 48 * 16 * 4);
  }
}

TEST(Report, has_the_scales_of_calibrated_layers) {
  nn::Sequential net = two_linears();
  quantize(net, {.weights = qint8, .activations = qint8});
  EXPECT_EQ(report(net).layers.at(0).activations, qint8);
  EXPECT_EQ(report(net).layers.at(0).input_scale, std::nullopt);
  {
    torch::NoGradGuard no_grad;
    Calibration calibration(net);
    net->forward(torch::full({2, 24}, 12.7));
  }
  const LayerReport first = report(net).layers.at(0);
  EXPECT_FLOAT_EQ(first.input_scale.value(), 0.1);
  EXPECT_TRUE(first.output_scale.has_value());
  EXPECT_TRUE(first.quantizes_output);
  EXPECT_FALSE(report(net).layers.at(1).quantizes_output);
}

TEST(Report, prints_a_line_a_layer_and_the_totals) {
  nn::Sequential net = model();
  quantize(net, {.weights = qint4, .activations = qint8, .exclude = {"5"}});
  freeze(net);
  std::ostringstream text;
  text << report(net);
  std::vector<std::string> lines;
  std::istringstream split(text.str());
  for (std::string line; std::getline(split, line);) lines.push_back(line);
  ASSERT_EQ(lines.size(), 7u);
  EXPECT_THAT(lines[0], StartsWith("layer  kind"));
  EXPECT_THAT(lines[1], testing::ContainsRegex(
                            "^0 +Conv2d +qint4 +row +qint8 dynamic +432 +86 +[0-9.]+ dB +frozen$"));
  EXPECT_THAT(lines[2],
              testing::ContainsRegex("^1 +BatchNorm2d +- +- +- +32 +32 +- +no quantized"));
  EXPECT_THAT(lines[3], testing::ContainsRegex(
                            "^3 +Linear +qint4 +128 +qint8 dynamic +16384 +2304 .* dB +frozen$"));
  EXPECT_THAT(lines[4],
              testing::ContainsRegex("^4 +LayerNorm +- +- +qint8 +64 +64 +- +float weight$"));
  EXPECT_THAT(lines[5], testing::ContainsRegex("^5 +Linear +- +- +- +128 +128 +- +not quantized$"));
  EXPECT_THAT(lines[6], testing::ContainsRegex(
                            "^all parameters and buffers: 17[0-9]+ bytes before, 2[0-9]+ after "
                            "\\(1[0-9]\\.[0-9] %\\)$"));
  for (size_t i = 0; i < 6; ++i) {  // the second column begins at the same place
    EXPECT_EQ(lines[i].substr(5, 2), "  ");
    EXPECT_NE(lines[i][7], ' ');
  }
}

TEST(Report, of_a_root_layer_calls_it_root) {
  nn::Linear linear(4, 4);
  std::ostringstream text;
  text << quantize(linear, {.weights = qint8});
  EXPECT_THAT(text.str(), HasSubstr("\n(root)  Linear  qint8"));
}

}  // namespace
}  // namespace quantal
