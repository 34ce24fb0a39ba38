#include "kernels/tap_conv.h"

#include <map>

#include <gtest/gtest.h>

#include "kernels/conv_problem.h"
#include "kernels/sample.h"

namespace quantal::kernels {
namespace {

// Beside odd_shapes(): of whole registers of channels, and of tiles of rows.
std::vector<ConvShape> shapes_of_many_channels() {
  const ConvShape square{
      .channels = 32, .rows = 48, .input = {1, 9, 11}, .kernel = {1, 3, 3}, .padding = {0, 1, 1}};
  std::vector<ConvShape> all(8, square);
  all[1].stride = {1, 2, 2};
  all[2].dilation = {1, 2, 3};
  all[2].padding = {0, 2, 3};
  all[3].groups = 3, all[3].channels = 51;
  all[4].stride = {1, 3, 2}, all[4].kernel = {1, 2, 5}, all[4].rows = 33, all[4].channels = 17;
  all[5].groups = 2, all[5].rows = 96, all[5].stride = {1, 2, 1}, all[5].batch = 2;
  all[6].input = {3, 6, 5}, all[6].kernel = {2, 3, 2}, all[6].padding = {1, 0, 1};
  all[6].stride = {2, 1, 1}, all[6].channels = 19;
  all[7].input = {1, 1, 70}, all[7].kernel = {1, 1, 4}, all[7].padding = {0, 0, 2};
  all[7].batch = 3, all[7].rows = 17;
  // Many samples of few positions; padding wider than the input; one pixel.
  all.push_back({.batch = 9,
                 .channels = 64,
                 .rows = 32,
                 .input = {1, 3, 3},
                 .kernel = {1, 3, 3},
                 .padding = {0, 1, 1}});
  all.push_back(
      {.channels = 20, .rows = 20, .input = {1, 2, 3}, .kernel = {1, 5, 4}, .padding = {0, 4, 5}});
  all.push_back({.channels = 16, .rows = 40, .input = {1, 1, 1}, .padding = {0, 1, 1}});
  // Groups together in a tile.
  all.push_back({.batch = 2,
                 .channels = 64,
                 .rows = 32,
                 .groups = 8,
                 .input = {1, 7, 9},
                 .kernel = {1, 3, 3},
                 .padding = {0, 1, 1}});
  all.push_back(all.back());
  all.back().groups = 4, all.back().dilation = {1, 2, 2};
  all.push_back(
      {.channels = 128, .rows = 32, .groups = 32, .input = {1, 5, 6}, .kernel = {1, 2, 2}});
  return all;
}

class TapConv : public testing::TestWithParam<Isa> {
 protected:
  // False where there is no kernel.
  bool run(ConvProblem& call, const std::optional<float>& y_scale = {},
           const ParallelFor& parallel_for = serial_for) {
    if (find_tap_conv(GetParam(), call.shape, call.layout) == nullptr) return false;
    IntegerConvArgs args = call.args();
    if (y_scale) {
      const std::int64_t count = call.size() / size_of(call.c.type);
      const GuardedBytes out(count, call.c.edge);
      args.y = out.data(), args.y_scale = y_scale;
      EXPECT_TRUE(conv_by_taps(GetParam(), args, parallel_for));
      const auto* first = reinterpret_cast<const std::int8_t*>(out.data());
      EXPECT_EQ(std::vector<std::int8_t>(first, first + count), call.expected_codes(*y_scale))
          << call.c.name();
      return true;
    }
    std::fill_n(call.y.data(), call.y.size(), std::byte{0x5A});
    EXPECT_TRUE(conv_by_taps(GetParam(), args, parallel_for));
    EXPECT_EQ(std::vector<std::byte>(call.y.data(), call.y.data() + call.size()), call.expected())
        << call.c.name();
    return true;
  }

  Sample sample_;
};
std::vector<Isa> isas_with_kernels() {
  const PackedLayout layout({QTypeId::kInt8, 16, 16, 0, FloatType::kF32});
  std::vector<Isa> found;
  for (const Isa isa : supported_isas()) {
    if (find_tap_conv(isa, {.channels = 16, .rows = 16}, layout) != nullptr) found.push_back(isa);
  }
  return found;
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(TapConv);
INSTANTIATE_TEST_SUITE_P(EveryIsa, TapConv, testing::ValuesIn(isas_with_kernels()),
                         [](const auto& info) { return std::string(isa_name(info.param)); });

TEST_P(TapConv, is_the_integer_linear_of_patches) {
  std::vector<ConvShape> shapes = odd_shapes();
  std::ranges::copy(shapes_of_many_channels(), std::back_inserter(shapes));
  int count = 0;
  for (const ConvShape& shape : shapes) {
    for (const FloatType type : kFloatTypes) {
      for (const ChannelOrder order : {ChannelOrder::kPlanes, ChannelOrder::kLast}) {
        if (!sample_.takes_next()) continue;
        const Edge edge = count % 2 == 0 ? Edge::kLast : Edge::kFirst;
        ConvProblem call({.shape = shape, .type = type, .order = order, .edge = edge});
        count += run(call) && run(call, 0.37F);
        if (HasFailure()) return;
      }
    }
  }
  EXPECT_GT(count, 10);
}

TEST_P(TapConv, of_extreme_codes_is_exact) {
  const ConvShape shape{
      .channels = 70, .rows = 20, .input = {1, 5, 6}, .kernel = {1, 3, 3}, .padding = {0, 1, 1}};
  for (const int code : {-128, 127}) {
    for (const int weight : {-128, 127}) {
      ConvProblem call({.shape = shape});
      std::fill_n(call.codes.data(), call.codes.size(), static_cast<std::byte>(code));
      std::ranges::fill(call.weight.data, static_cast<std::uint8_t>(weight));
      call.repack();
      EXPECT_TRUE(run(call));
    }
  }
}

// Several slabs, of one strip and of many, and blocks of tokens, by pairs of tiles.
TEST_P(TapConv, gives_the_same_bits_on_any_number_of_threads_and_in_any_strips) {
  const ConvShape large{.channels = 256,
                        .rows = 34,
                        .input = {1, 100, 130},
                        .kernel = {1, 2, 1},
                        .stride = {1, 2, 2}};
  const ConvShape many{.batch = 40,
                       .channels = 96,
                       .rows = 3,
                       .input = {1, 60, 60},
                       .kernel = {1, 1, 2},
                       .stride = {1, 3, 1}};
  const ConvShape small{
      .channels = 20, .rows = 100, .input = {1, 31, 29}, .kernel = {1, 3, 3}, .padding = {0, 1, 1}};
  static std::map<std::string, std::vector<std::byte>> plain;  // of every instruction set
  for (const ConvShape& shape : {large, many, small}) {
    for (const ChannelOrder order : {ChannelOrder::kPlanes, ChannelOrder::kLast}) {
      if (!sample_.takes_next()) continue;
      ConvProblem call({.shape = shape, .order = order});
      auto& expected = plain[call.c.name()];
      if (expected.empty()) expected = call.run(Isa::kPortable);
      for (const ParallelFor& parallel_for : {ParallelFor(serial_for), in_parts(4)}) {
        std::fill_n(call.y.data(), call.y.size(), std::byte{0x5A});
        EXPECT_TRUE(conv_by_taps(GetParam(), call.args(), parallel_for));
        EXPECT_TRUE(std::equal(expected.begin(), expected.end(), call.y.data())) << call.c.name();
      }
    }
  }
}

TEST_P(TapConv, a_scale_that_is_nan_spoils_its_sample_only) {
  ConvProblem call(
      {.shape = {.batch = 2, .channels = 16, .rows = 2, .input = {1, 4, 4}, .kernel = {1, 2, 2}}});
  call.scales[0] = std::numeric_limits<float>::quiet_NaN();
  IntegerConvArgs args = call.args();
  EXPECT_TRUE(conv_by_taps(GetParam(), args));
  for (int i = 0; i < 36; ++i) {
    EXPECT_EQ(std::isnan(load_float(call.y.data(), i, FloatType::kF32)), i < 18);
  }
  args.y_scale = 1;
  EXPECT_FALSE(conv_by_taps(GetParam(), args));
}

}  // namespace
}  // namespace quantal::kernels
