#include "kernels/float_conv.h"

#include <cmath>
#include <limits>

#include <gtest/gtest.h>

#include "kernels/canonical_linear.h"
#include "kernels/conv_problem.h"
#include "kernels/sample.h"

namespace quantal::kernels {
namespace {

// More than a panel of columns, more than a strip of positions, which begins within a sample, more
// than a block of rows; and sizes at which what is read together would compete for the cache.
std::vector<ConvShape> large_shapes() {
  return {
      {.batch = 3, .channels = 29, .rows = 70, .input = {1, 19, 11}, .kernel = {1, 3, 3}},
      {.channels = 131, .rows = 17, .input = {1, 4, 4}, .kernel = {1, 3, 3}, .padding = {0, 1, 1}},
      {.channels = 300, .rows = 9, .input = {1, 16, 16}},
      {.channels = 128, .rows = 5, .input = {1, 5, 5}, .kernel = {1, 3, 3}},
      {.batch = 2, .channels = 64, .rows = 33, .input = {1, 1, 600}, .stride = {1, 1, 2}},
      // Five tiles a group; one.
      {.batch = 2,
       .channels = 10,
       .rows = 160,
       .groups = 2,
       .input = {1, 19, 17},
       .kernel = {1, 3, 3}},
      {.channels = 64, .rows = 64, .groups = 4, .input = {1, 24, 25}, .padding = {0, 1, 0}},
      // Packed in blocks that begin within a group, for few positions.
      {.channels = 256,
       .rows = 768,
       .groups = 4,
       .input = {1, 2, 3},
       .kernel = {1, 3, 3},
       .padding = {0, 1, 1}},
  };
}

std::vector<ConvShape> all_shapes() {
  std::vector<ConvShape> all = large_shapes();
  for (const ConvShape& shape : odd_shapes()) {
    if (takes_groups(shape)) all.push_back(shape);
  }
  return all;
}

/// Input, weight, bias and output of one convolution, all of them against guard pages.
struct FloatConvProblem {
  ConvCase c;
  ConvShape shape;
  RandomWeight weight;
  GuardedPacked packed;
  GuardedBytes x, bias, y;

  explicit FloatConvProblem(const ConvCase& given)
      : c(given),
        shape(c.shape),
        weight({c.qtype, shape.rows, shape.columns(), c.group_size, FloatType::kF32}),
        packed(weight, c.edge),
        x(shape.batch * shape.channels * shape.pixels() * size_of(c.type), c.edge),
        bias(shape.rows * size_of(c.type), c.edge),
        y(count() * size_of(c.type), c.edge) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (std::int64_t i = 0; i < shape.batch * shape.channels * shape.pixels(); ++i) {
      store_float(x.data(), i, c.type, normal(random));
    }
    for (std::int64_t i = 0; i < shape.rows; ++i) {
      store_float(bias.data(), i, c.type, normal(random));
    }
  }

  std::int64_t count() const { return shape.batch * shape.rows * shape.positions(); }

  FloatConvArgs args() const {
    return {.shape = shape,
            .layout = &packed.layout,
            .weight = packed.data(),
            .type = c.type,
            .order = c.order,
            .x = x.data(),
            .y = y.data(),
            .bias = bias.data()};
  }

  std::vector<std::byte> run(Isa isa, const ParallelFor& parallel_for = serial_for) const {
    std::fill_n(y.data(), y.size(), std::byte{0x5A});
    float_conv(isa, args(), parallel_for);
    return {y.data(), y.data() + y.size()};
  }

  std::vector<std::byte> run_canonical(Isa isa, const ParallelFor& parallel_for) const {
    std::fill_n(y.data(), y.size(), std::byte{0x5A});
    FloatConvArgs call = args();
    call.weight = nullptr;
    const GuardedCanonical canonical(weight, c.edge);
    float_conv_from_canonical(isa, call, canonical.get(), parallel_for);
    return {y.data(), y.data() + y.size()};
  }

  /// What the kernel covers at a position.
  void write_patch(std::int64_t sample, std::int64_t group, const ConvShape::Extent& at,
                   std::byte* out) const {
    std::int64_t column = 0;
    for (const std::int64_t i : c.patch(sample, group, at)) {
      store_float(out, column++, c.type, i < 0 ? 0.0F : load_float(x.data(), i, c.type));
    }
  }

  /// AVX2's linear of patches, of which it has another for a few.
  std::vector<std::byte> expected() const {
    std::vector<std::byte> out(y.size());
    for (std::int64_t group = 0; group < shape.groups; ++group) expect_group(group, out);
    return out;
  }

  void expect_group(std::int64_t group, std::vector<std::byte>& out) const {
    const std::int64_t positions = shape.positions(), tokens = shape.batch * positions;
    const std::int64_t enough = std::max<std::int64_t>(tokens, 7), size = size_of(c.type);
    std::vector<std::byte> patches(enough * shape.columns() * size);
    std::vector<std::byte> rows(enough * shape.rows * size);
    for (std::int64_t n = 0; n < shape.batch; ++n) {
      ConvShape::Extent at{};
      for (std::int64_t p = 0; p < positions; ++p, advance(at, shape.output())) {
        write_patch(n, group, at, patches.data() + (n * positions + p) * shape.columns() * size);
      }
    }
    const LinearArgs linear{.layout = &packed.layout,
                            .weight = packed.data(),
                            .tokens = enough,
                            .type = c.type,
                            .x = patches.data(),
                            .x_stride = shape.columns(),
                            .y = rows.data(),
                            .y_stride = shape.rows,
                            .bias = bias.data()};
    find_linear(Isa::kAvx2, packed.layout.spec())(linear, serial_for);
    for (std::int64_t i = 0; i < tokens * shape.rows; ++i) {
      const std::int64_t token = i / shape.rows, row = i % shape.rows;
      if (row / shape.group_rows() != group) continue;
      const std::int64_t to = c.output_index(token / positions, row, token % positions);
      std::memcpy(out.data() + to * size, rows.data() + i * size, size);
    }
  }
};

std::vector<Isa> isas_with_kernel() {
  std::vector<Isa> found;
  for (const Isa isa : supported_isas()) {
    if (find_float_conv(isa) != nullptr) found.push_back(isa);
  }
  return found;
}

class FloatConv : public testing::TestWithParam<IsaAndType> {};
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(FloatConv);
INSTANTIATE_TEST_SUITE_P(EveryIsa, FloatConv,
                         testing::Combine(testing::ValuesIn(isas_with_kernel()),
                                          testing::ValuesIn(kAllTypes)),
                         name_of);

TEST_P(FloatConv, has_the_bits_of_a_linear_of_patches) {
  const auto [isa, qtype] = GetParam();
  Sample sample;
  Edge edge = Edge::kFirst;
  for (const ConvShape& shape : all_shapes()) {
    for (const std::int64_t group_size : {0, 8, 32}) {
      if (group_size > 0 && !is_affine(qtype)) continue;
      for (const FloatType type : kFloatTypes) {
        for (const ChannelOrder order : {ChannelOrder::kPlanes, ChannelOrder::kLast}) {
          if (!sample.takes_next()) continue;
          edge = edge == Edge::kLast ? Edge::kFirst : Edge::kLast;
          const FloatConvProblem call({shape, qtype, group_size, type, order, edge});
          ASSERT_EQ(call.run(isa), call.expected()) << call.c.name();
        }
      }
    }
  }
}

TEST_P(FloatConv, gives_the_same_bits_on_any_number_of_threads_and_from_canonical_form) {
  const auto [isa, qtype] = GetParam();
  for (const ConvShape& shape : all_shapes()) {
    for (const ChannelOrder order : {ChannelOrder::kPlanes, ChannelOrder::kLast}) {
      const std::int64_t group_size = is_affine(qtype) ? 32 : 0;
      const FloatConvProblem call({shape, qtype, group_size, FloatType::kF32, order});
      const auto one = call.run(isa);
      EXPECT_EQ(call.run(isa, in_parts(3)), one) << call.c.name();
      EXPECT_EQ(call.run_canonical(isa, serial_for), one) << call.c.name();
      EXPECT_EQ(call.run_canonical(isa, in_parts(3)), one) << call.c.name();
    }
  }
}

TEST_P(FloatConv, an_infinity_stays_in_the_positions_that_read_it) {
  const auto [isa, qtype] = GetParam();
  for (const ChannelOrder order : {ChannelOrder::kPlanes, ChannelOrder::kLast}) {
    const FloatConvProblem call({.shape = {.batch = 2,
                                           .channels = 3,
                                           .rows = 5,
                                           .input = {1, 6, 7},
                                           .kernel = {1, 3, 3},
                                           .padding = {0, 1, 1}},
                                 .qtype = qtype,
                                 .order = order});
    // The first pixel of the second sample.
    store_float(call.x.data(), call.c.input_index(1, 2, 0), FloatType::kF32,
                std::numeric_limits<float>::infinity());
    const auto y = call.run(isa);
    for (std::int64_t i = 0; i < call.count(); ++i) {
      const std::int64_t in_sample = i % (5 * 42);
      const std::int64_t p = order == ChannelOrder::kPlanes ? in_sample % 42 : in_sample / 5;
      const bool reads = i >= 5 * 42 && p / 7 <= 1 && p % 7 <= 1;
      EXPECT_EQ(std::isfinite(load_float(y.data(), i, FloatType::kF32)), !reads) << i;
    }
  }
}

TEST_P(FloatConv, takes_no_bias_and_empty_batches) {
  const auto [isa, qtype] = GetParam();
  const FloatConvProblem call(
      {.shape = {.channels = 2, .rows = 3, .input = {1, 4, 4}}, .qtype = qtype});
  std::fill_n(call.bias.data(), call.bias.size(), std::byte{0});
  const auto with_zeros = call.run(isa);
  FloatConvArgs args = call.args();
  args.bias = nullptr;
  float_conv(isa, args);
  EXPECT_EQ(std::memcmp(with_zeros.data(), call.y.data(), with_zeros.size()), 0);
  EXPECT_TRUE(FloatConvProblem({.shape = {.batch = 0, .channels = 2, .rows = 3}, .qtype = qtype})
                  .run(isa)
                  .empty());
}

}  // namespace
}  // namespace quantal::kernels
