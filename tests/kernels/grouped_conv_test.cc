#include "kernels/grouped_conv.h"

#include <cmath>
#include <cstring>
#include <limits>

#include <gtest/gtest.h>

#include "kernels/conv_problem.h"
#include "kernels/sample.h"

namespace quantal::kernels {
namespace {

// Groups of every size that kernels tell apart, lines shorter than a register and longer than
// several, strides and dilation in every dimension, padding wider than the input, and sizes of
// which a block does not hold all lines.
std::vector<ConvShape> grouped_shapes() {
  std::vector<ConvShape> all = {
      {.batch = 2,
       .channels = 19,
       .rows = 19,
       .groups = 19,
       .input = {1, 9, 13},
       .kernel = {1, 3, 3},
       .padding = {0, 1, 1}},
      {.channels = 128,
       .rows = 128,
       .groups = 128,
       .input = {1, 11, 10},
       .kernel = {1, 5, 5},
       .stride = {1, 2, 2},
       .padding = {0, 2, 2}},
      {.channels = 9,
       .rows = 18,
       .groups = 9,
       .input = {1, 7, 70},
       .kernel = {1, 3, 4},
       .stride = {1, 2, 3},
       .padding = {0, 3, 5},
       .dilation = {1, 2, 2}},
      {.batch = 3,
       .channels = 12,
       .rows = 12,
       .groups = 3,
       .input = {1, 6, 17},
       .kernel = {1, 3, 3},
       .padding = {0, 1, 1}},
      {.channels = 20, .rows = 20, .groups = 10, .input = {1, 8, 8}, .kernel = {1, 2, 2}},
      {.channels = 6,
       .rows = 48,
       .groups = 2,
       .input = {1, 8, 9},
       .kernel = {1, 3, 3},
       .padding = {0, 1, 1}},
      {.channels = 10,
       .rows = 14,
       .groups = 2,
       .input = {3, 5, 12},
       .kernel = {2, 3, 3},
       .stride = {1, 2, 1},
       .padding = {1, 1, 1},
       .dilation = {2, 1, 1}},
      {.batch = 2,
       .channels = 8,
       .rows = 8,
       .groups = 8,
       .input = {1, 1, 100},
       .kernel = {1, 1, 9},
       .padding = {0, 0, 4}},
      {.channels = 8, .rows = 8, .groups = 8, .input = {1, 2, 1}, .padding = {0, 3, 20}},
      {.batch = 2,
       .channels = 10,
       .rows = 10,
       .groups = 10,
       .input = {1, 7, 7},
       .kernel = {1, 7, 7},
       .padding = {0, 3, 3}},
      {.batch = 2,
       .channels = 40,
       .rows = 40,
       .groups = 40,
       .input = {1, 6, 25},
       .kernel = {1, 3, 5},
       .padding = {0, 1, 2}},
      {.channels = 40,
       .rows = 40,
       .groups = 40,
       .input = {1, 5, 9},
       .kernel = {1, 3, 3},
       .padding = {0, 7, 9},
       .dilation = {1, 3, 4}},
      {.channels = 24,
       .rows = 24,
       .groups = 24,
       .input = {2, 9, 18},
       .kernel = {2, 3, 3},
       .stride = {1, 2, 2},
       .padding = {1, 1, 1}},
      {.channels = 2,
       .rows = 2,
       .groups = 2,
       .input = {1, 300, 310},
       .kernel = {1, 3, 3},
       .padding = {0, 1, 1}},
      // One line of one group, and more lines of the kernel than are read where they lie.
      {.channels = 2, .rows = 37, .input = {1, 1, 200}, .kernel = {1, 1, 5}, .padding = {0, 0, 2}},
      {.channels = 16, .rows = 16, .groups = 16, .input = {1, 18, 9}, .kernel = {1, 17, 3}},
      {.channels = 16,
       .rows = 16,
       .groups = 16,
       .input = {3, 7, 12},
       .kernel = {3, 6, 3},
       .padding = {1, 0, 1}},
      {.channels = 192,
       .rows = 96,
       .groups = 12,
       .input = {1, 20, 30},
       .kernel = {1, 3, 3},
       .padding = {0, 1, 1}},
  };
  for (const ConvShape& shape : odd_shapes()) all.push_back(shape);
  return all;
}

/// Input, weight, bias and output of one convolution, all of them against guard pages.
struct GroupedConvProblem {
  ConvCase c;
  ConvShape shape;
  GuardedBytes weight, x, bias, y;

  explicit GroupedConvProblem(const ConvCase& given)
      : c(given),
        shape(c.shape),
        weight(shape.rows * shape.columns() * size_of(FloatType::kF32), c.edge),
        x(shape.batch * shape.channels * shape.pixels() * size_of(c.type), c.edge),
        bias(shape.rows * size_of(c.type), c.edge),
        y(count() * size_of(c.type), c.edge) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    const auto fill = [&](const GuardedBytes& bytes, FloatType type) {
      for (std::int64_t i = 0; i < bytes.size() / size_of(type); ++i) {
        store_float(bytes.data(), i, type, normal(random));
      }
    };
    fill(weight, FloatType::kF32);
    fill(x, c.type);
    fill(bias, c.type);
  }

  std::int64_t count() const { return shape.batch * shape.rows * shape.positions(); }

  GroupedConvArgs args() const {
    return {.shape = shape,
            .weight = reinterpret_cast<const float*>(weight.data()),
            .type = c.type,
            .order = c.order,
            .x = x.data(),
            .y = y.data(),
            .bias = bias.data()};
  }

  std::vector<std::byte> run(Isa isa, const ParallelFor& parallel_for = serial_for) const {
    std::fill_n(y.data(), y.size(), std::byte{0x5A});
    grouped_conv(isa, args(), parallel_for);
    return {y.data(), y.data() + y.size()};
  }

  /// Every number of y, in its planes whatever the order, against the sum in fp64.
  void expect_right() const {
    for (std::int64_t n = 0; n < shape.batch; ++n) {
      ConvShape::Extent at{};
      for (std::int64_t p = 0; p < shape.positions(); ++p, advance(at, shape.output())) {
        for (std::int64_t group = 0; group < shape.groups; ++group) {
          expect_right(n, group, p, c.patch(n, group, at));
        }
      }
    }
  }

 private:
  void expect_right(std::int64_t n, std::int64_t group, std::int64_t p,
                    const std::vector<std::int64_t>& patch) const {
    for (std::int64_t i = 0; i < shape.group_rows(); ++i) {
      const std::int64_t row = group * shape.group_rows() + i;
      double sum = load_float(bias.data(), row, c.type), magnitude = std::abs(sum);
      for (std::size_t k = 0; k < patch.size(); ++k) {
        if (patch[k] < 0) continue;
        const double product =
            static_cast<double>(load_float(x.data(), patch[k], c.type)) *
            load_float(weight.data(), row * shape.columns() + static_cast<std::int64_t>(k),
                       FloatType::kF32);
        sum += product;
        magnitude += std::abs(product);
      }
      const double in_fp32 =
          magnitude * static_cast<double>(patch.size() + 1) * epsilon_of(FloatType::kF32);
      const float found = load_float(y.data(), c.output_index(n, row, p), c.type);
      ASSERT_NEAR(found, sum, in_fp32 + rounding_of(c.type, std::abs(sum) + in_fp32))
          << c.name() << ": " << n << ' ' << row << ' ' << p;
    }
  }
};

class GroupedConv : public testing::TestWithParam<Isa> {};
INSTANTIATE_TEST_SUITE_P(EveryIsa, GroupedConv, testing::ValuesIn(supported_isas()),
                         [](const auto& info) { return std::string(isa_name(info.param)); });

TEST_P(GroupedConv, sums_as_fp64_does_with_the_same_bits_in_either_order_on_any_threads) {
  Sample sample;
  Edge edge = Edge::kFirst;
  for (const ConvShape& shape : grouped_shapes()) {
    for (const FloatType type : kFloatTypes) {
      if (!sample.takes_next()) continue;
      edge = edge == Edge::kLast ? Edge::kFirst : Edge::kLast;
      ConvCase c{.shape = shape, .type = type, .edge = edge};
      if (find_grouped_conv(GetParam(), shape, c.order) == nullptr) continue;
      const GroupedConvProblem planes(c);
      const auto one = planes.run(GetParam());
      ASSERT_NO_FATAL_FAILURE(planes.expect_right());
      EXPECT_EQ(planes.run(GetParam(), in_parts(3)), one) << c.name();

      c.order = ChannelOrder::kLast;
      if (find_grouped_conv(GetParam(), shape, c.order) == nullptr) continue;
      const GroupedConvProblem pixels(c);
      const auto last = pixels.run(GetParam());
      ASSERT_NO_FATAL_FAILURE(pixels.expect_right());
      EXPECT_EQ(pixels.run(GetParam(), in_parts(3)), last) << c.name();
    }
  }
}

TEST_P(GroupedConv, either_order_has_the_same_bits) {
  for (const ConvShape& shape : grouped_shapes()) {
    const GroupedConvProblem planes({.shape = shape});
    const GroupedConvProblem pixels({.shape = shape, .order = ChannelOrder::kLast});
    if (find_grouped_conv(GetParam(), shape, ChannelOrder::kPlanes) == nullptr ||
        find_grouped_conv(GetParam(), shape, ChannelOrder::kLast) == nullptr) {
      continue;
    }
    for (std::int64_t n = 0; n < shape.batch; ++n) {
      for (std::int64_t p = 0; p < shape.pixels(); ++p) {
        for (std::int64_t ch = 0; ch < shape.channels; ++ch) {
          store_float(pixels.x.data(), pixels.c.input_index(n, ch, p), FloatType::kF32,
                      load_float(planes.x.data(), planes.c.input_index(n, ch, p), FloatType::kF32));
        }
      }
    }
    planes.run(GetParam());
    pixels.run(GetParam());
    for (std::int64_t i = 0; i < planes.count(); ++i) {
      const std::int64_t p = i % shape.positions(), row = i / shape.positions() % shape.rows;
      const std::int64_t n = i / shape.positions() / shape.rows;
      ASSERT_EQ(load_float(planes.y.data(), i, FloatType::kF32),
                load_float(pixels.y.data(), pixels.c.output_index(n, row, p), FloatType::kF32))
          << planes.c.name() << ": " << i;
    }
  }
}

TEST_P(GroupedConv, an_infinity_stays_in_its_group_and_in_the_positions_that_read_it) {
  for (const ChannelOrder order : {ChannelOrder::kPlanes, ChannelOrder::kLast}) {
    for (const std::int64_t groups : {6, 12}) {
      const GroupedConvProblem call({.shape = {.batch = 2,
                                               .channels = 12,
                                               .rows = 12,
                                               .groups = groups,
                                               .input = {1, 6, 7},
                                               .kernel = {1, 3, 3},
                                               .padding = {0, 1, 1}},
                                     .order = order});
      if (find_grouped_conv(GetParam(), call.shape, order) == nullptr) continue;
      // The first pixel of the second sample.
      store_float(call.x.data(), call.c.input_index(1, 2, 0), FloatType::kF32,
                  std::numeric_limits<float>::infinity());
      call.run(GetParam());
      const std::int64_t group_rows = 12 / groups;
      for (std::int64_t n = 0; n < 2; ++n) {
        for (std::int64_t row = 0; row < 12; ++row) {
          for (std::int64_t p = 0; p < 42; ++p) {
            const bool is_of_group = row / group_rows == 2 / group_rows;
            const bool reads = n == 1 && is_of_group && p / 7 <= 1 && p % 7 <= 1;
            const float found =
                load_float(call.y.data(), call.c.output_index(n, row, p), FloatType::kF32);
            EXPECT_EQ(std::isfinite(found), !reads) << n << ' ' << row << ' ' << p;
          }
        }
      }
    }
  }
}

// However a call's lines lie.
TEST_P(GroupedConv, divides_among_threads) {
  const std::vector<ConvShape> shapes = {
      {.channels = 1, .rows = 64, .input = {1, 1, 4000}, .kernel = {1, 1, 9}},
      {.channels = 3, .rows = 32, .input = {1, 64, 64}, .kernel = {1, 3, 3}},
      {.channels = 256, .rows = 256, .groups = 256, .input = {1, 1, 500}, .kernel = {1, 1, 3}},
  };
  for (const ConvShape& shape : shapes) {
    for (const ChannelOrder order : {ChannelOrder::kPlanes, ChannelOrder::kLast}) {
      const GroupedConvProblem call({.shape = shape, .order = order});
      if (find_grouped_conv(GetParam(), shape, order) == nullptr) continue;
      std::int64_t blocks = 0;
      call.run(GetParam(), [&](std::int64_t count, const auto& body) {
        blocks = count;
        body(0, count);
      });
      // 64 rows are four times 16 where lanes are rows.
      EXPECT_GE(blocks, order == ChannelOrder::kLast ? 4 : 16) << call.c.name();
    }
  }
}

TEST_P(GroupedConv, takes_no_bias_and_empty_batches) {
  const GroupedConvProblem call(
      {.shape = {.channels = 8, .rows = 8, .groups = 8, .input = {1, 4, 4}}});
  std::fill_n(call.bias.data(), call.bias.size(), std::byte{0});
  const auto with_zeros = call.run(GetParam());
  GroupedConvArgs args = call.args();
  args.bias = nullptr;
  grouped_conv(GetParam(), args);
  EXPECT_EQ(std::memcmp(with_zeros.data(), call.y.data(), with_zeros.size()), 0);
  EXPECT_TRUE(GroupedConvProblem({.shape = {.batch = 0, .channels = 8, .rows = 8, .groups = 8}})
                  .run(GetParam())
                  .empty());
}

}  // namespace
}  // namespace quantal::kernels
