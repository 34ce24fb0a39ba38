#include "kernels/integer_conv.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include <gtest/gtest.h>

#include "kernels/conv_problem.h"
#include "kernels/sample.h"

namespace quantal::kernels {
namespace {

using Extent = ConvShape::Extent;

const std::vector<QTypeId> kIntegerTypes = {QTypeId::kInt2, QTypeId::kInt4, QTypeId::kInt8};

const std::vector<ConvShape>& depthwise_shapes() {
  static const std::vector<ConvShape> all = [] {
    std::vector<ConvShape> found;
    for (const std::int64_t channels : {2, 3, 7, 15, 16, 17, 33, 48}) {
      found.push_back({.batch = 2,
                       .channels = channels,
                       .rows = channels,
                       .groups = channels,
                       .input = {1, 7, 9},
                       .kernel = {1, 3, 3},
                       .stride = {1, 2, 1},
                       .padding = {0, 1, 1}});
    }
    const ConvShape odd{.channels = 31, .rows = 31, .groups = 31};
    const ConvShape even{.channels = 40, .rows = 40, .groups = 40};
    for (const auto& [input, kernel] :
         std::vector<std::pair<Extent, Extent>>{{{1, 1, 65}, {1, 1, 2}},
                                                {{1, 1, 20}, {1, 1, 15}},
                                                {{3, 5, 7}, {2, 3, 3}},
                                                {{1, 5, 5}, {1, 1, 1}},
                                                {{1, 11, 12}, {1, 5, 5}}}) {
      for (const ConvShape& shape : {odd, even}) {
        found.push_back(shape);
        found.back().input = input;
        found.back().kernel = kernel;
        found.back().dilation = {1, 2, 1};
        found.back().padding = {0, 2, 1};
      }
    }
    found.push_back(even);
    found.back().input = {1, 4, 9};
    found.back().kernel = {1, 2, 3};
    found.back().padding = {0, 0, 11};
    found.back().dilation = {1, 1, 4};
    // Kernels of every width that has a loop of its own, over lines of all kinds of lengths.
    for (const std::int64_t width : {3, 5, 7}) {
      for (const std::int64_t stride : {1, 2, 3}) {
        for (const std::int64_t length : {7, 24}) {
          for (const std::int64_t channels : {9, 24}) {
            found.push_back({.channels = channels,
                             .rows = channels,
                             .groups = channels,
                             .input = {1, 3, length},
                             .kernel = {1, 2, width},
                             .stride = {1, 1, stride},
                             .padding = {0, 1, width / 2}});
          }
        }
      }
    }
    return found;
  }();
  return all;
}

class IntegerConv : public testing::TestWithParam<IsaAndType> {
 protected:
  void expect_exact(const ConvShape& shape) {
    const auto [isa, qtype] = GetParam();
    for (const std::int64_t group_size : {0, 8, 32}) {
      if (group_size > 0 && qtype == QTypeId::kInt8) continue;
      for (const FloatType type : kFloatTypes) {
        for (const ChannelOrder order : {ChannelOrder::kPlanes, ChannelOrder::kLast}) {
          if (!sample_.takes_next()) continue;
          edge_ = edge_ == Edge::kLast ? Edge::kFirst : Edge::kLast;
          ConvProblem call({shape, qtype, group_size, type, order, edge_});
          ASSERT_EQ(call.run(isa), call.expected()) << call.c.name();
          if (group_size != 0) continue;
          const float y_scale = 0.37F;
          ASSERT_EQ(call.run_to_codes(isa, y_scale), call.expected_codes(y_scale)) << call.c.name();
        }
      }
    }
  }

  Sample sample_;

 private:
  Edge edge_ = Edge::kFirst;
};
INSTANTIATE_TEST_SUITE_P(EveryIsa, IntegerConv,
                         testing::Combine(testing::ValuesIn(supported_isas()),
                                          testing::ValuesIn(kIntegerTypes)),
                         name_of);

TEST_P(IntegerConv, is_the_integer_linear_of_patches) {
  for (const ConvShape& shape : odd_shapes()) expect_exact(shape);
}

TEST_P(IntegerConv, depthwise_too) {
  for (const ConvShape& shape : depthwise_shapes()) {
    ASSERT_TRUE(shape.is_depthwise());
    expect_exact(shape);
  }
}

// Largest and least codes in any order, and products that are all as large as they get.
TEST_P(IntegerConv, of_extreme_codes_is_exact) {
  const auto [isa, qtype] = GetParam();
  constexpr std::uint8_t kCodes[] = {0x80, 0x81, 0x7F, 0x00};
  constexpr std::uint8_t kWeights[] = {0x80, 0xFF, 0x7F, 0x81, 0x00};
  const ConvShape dense{
      .channels = 70, .rows = 20, .input = {1, 5, 6}, .kernel = {1, 3, 3}, .padding = {0, 1, 1}};
  ConvShape depthwise = dense;
  depthwise.rows = depthwise.groups = depthwise.channels;
  for (const ConvShape& shape : {dense, depthwise}) {
    for (const ChannelOrder order : {ChannelOrder::kPlanes, ChannelOrder::kLast}) {
      for (const std::size_t kinds : {1, 2, 4}) {
        ConvProblem call({.shape = shape, .qtype = qtype, .order = order});
        std::mt19937 random(2);
        std::generate_n(call.codes.data(), call.codes.size(),
                        [&] { return std::byte{kCodes[random() % kinds]}; });
        for (auto& code : call.weight.data) code = kWeights[random() % (kinds == 4 ? 5 : kinds)];
        call.repack();
        ASSERT_EQ(call.run(isa), call.expected()) << call.c.name();
      }
    }
  }
}

// Sums that fp32 holds just so, and those that it would round, of as many columns and one more.
TEST_P(IntegerConv, of_extreme_codes_and_many_columns_is_exact) {
  const auto [isa, qtype] = GetParam();
  std::vector<ConvShape> shapes;
  for (const std::int64_t width : {32, 33}) {
    shapes.push_back(
        {.channels = 9, .rows = 9, .groups = 9, .input = {1, 32, width}, .kernel = {1, 32, width}});
    shapes.push_back({.channels = 32, .rows = 4, .input = {1, width, 8}, .kernel = {1, width, 1}});
  }
  for (const ConvShape& shape : shapes) {
    for (const ChannelOrder order : {ChannelOrder::kPlanes, ChannelOrder::kLast}) {
      ConvProblem call({.shape = shape, .qtype = qtype, .order = order});
      std::fill_n(call.codes.data(), call.codes.size(), std::byte{0x80});
      std::ranges::fill(call.weight.data, std::uint8_t{0x80});
      // The first and the last product of the first sum are 1: fp32 would lose both.
      const std::int64_t last = shape.pixels() - shape.output()[2];
      call.codes.data()[call.c.input_index(0, 0, 0)] = std::byte{1};
      call.codes.data()[call.c.input_index(0, shape.group_channels() - 1, last)] = std::byte{1};
      call.weight.data[0] = 1;
      if (qtype == QTypeId::kInt8) call.weight.data[shape.columns() - 1] = 1;
      call.repack();
      ASSERT_EQ(call.run(isa), call.expected()) << call.c.name();
    }
  }
}

TEST_P(IntegerConv, gives_the_same_bits_on_any_number_of_threads_and_in_any_blocks) {
  const auto [isa, qtype] = GetParam();
  // Blocks for every thread, one block that threads share, and several of those.
  for (const auto& [side, channels] : std::vector<std::pair<std::int64_t, std::int64_t>>{
           {100, 4}, {50, 7}, {9, 3}, {9, 6}, {15, 300}}) {
    for (const ChannelOrder order : {ChannelOrder::kPlanes, ChannelOrder::kLast}) {
      if (!sample_.takes_next()) continue;
      ConvProblem call({.shape = {.channels = channels,
                                  .rows = 20,
                                  .input = {1, side, side},
                                  .kernel = {1, 3, 3},
                                  .padding = {0, 1, 1}},
                        .qtype = qtype,
                        .order = order});
      const auto one = call.run(isa);
      EXPECT_EQ(one, call.run(isa, in_parts(4))) << call.c.name();
      EXPECT_EQ(one, call.expected()) << call.c.name();
    }
  }
  for (const std::int64_t channels : {12, 16}) {
    for (const std::int64_t groups : {channels, channels / 4}) {
      for (const ChannelOrder order : {ChannelOrder::kPlanes, ChannelOrder::kLast}) {
        ConvProblem call({.shape = {.batch = 2,
                                    .channels = channels,
                                    .rows = channels,
                                    .groups = groups,
                                    .input = {1, 19, 21},
                                    .kernel = {1, 3, 3},
                                    .padding = {0, 1, 1}},
                          .qtype = qtype,
                          .order = order});
        EXPECT_EQ(call.run(isa, in_parts(3)), call.expected()) << call.c.name();
        EXPECT_EQ(call.run_to_codes(isa, 0.4F, in_parts(3)), call.expected_codes(0.4F))
            << call.c.name();
      }
    }
  }
}

TEST_P(IntegerConv, a_scale_that_is_nan_spoils_its_sample_only) {
  const auto [isa, qtype] = GetParam();
  for (const std::int64_t groups : {1, 2}) {
    ConvProblem call({.shape = {.batch = 2,
                                .channels = 2,
                                .rows = 2,
                                .groups = groups,
                                .input = {1, 4, 4},
                                .kernel = {1, 2, 2}},
                      .qtype = qtype});
    call.scales[0] = std::numeric_limits<float>::quiet_NaN();
    const auto y = call.run(isa);
    for (int i = 0; i < 36; ++i) {
      EXPECT_EQ(std::isnan(load_float(y.data(), i, FloatType::kF32)), i < 18);
    }
    EXPECT_FALSE(call.run_to_codes(isa, 1.0F));
    call.scales[0] = 1;
    EXPECT_TRUE(call.run_to_codes(isa, 1.0F));
  }
}

TEST_P(IntegerConv, takes_empty_batches_and_outputs) {
  const auto [isa, qtype] = GetParam();
  ConvProblem({.shape = {.batch = 0, .channels = 2, .rows = 3}, .qtype = qtype}).run(isa);
  ConvProblem({.shape = {.channels = 2, .rows = 3, .kernel = {1, 2, 2}}, .qtype = qtype}).run(isa);
}

}  // namespace
}  // namespace quantal::kernels
