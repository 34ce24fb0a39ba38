#include "kernels/linear.h"

#include <cmath>
#include <cstring>

#include <gtest/gtest.h>

#include "kernels/exact.h"
#include "kernels/non_finite.h"
#include "kernels/sample.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kTokenCounts[] = {0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 17};
constexpr std::int64_t kMostTokens = 17;

class Linear : public testing::TestWithParam<IsaAndType> {};
INSTANTIATE_TEST_SUITE_P(EveryIsa, Linear,
                         testing::Combine(testing::ValuesIn(supported_isas()),
                                          testing::ValuesIn(kAllTypes)),
                         name_of);

TEST_P(Linear, equals_dequantize_then_multiply) {
  const auto [isa, qtype] = GetParam();
  Sample sample;
  for (const WeightSpec& spec : odd_specs(qtype)) {
    for (const FloatType type : kFloatTypes) {
      if (!sample.takes_next()) continue;
      const Problem problem(spec, type, kMostTokens);
      const Exact exact(problem);
      for (const std::int64_t tokens : kTokenCounts) {
        const Call call{.isa = isa, .tokens = tokens};
        exact.check(call, run_linear(problem, call));
      }
    }
  }
}

TEST_P(Linear, takes_strides_and_no_bias) {
  const auto [isa, qtype] = GetParam();
  for (const FloatType type : kFloatTypes) {
    const Problem problem({qtype, 37, 65, 0, FloatType::kF32}, type, kMostTokens);
    const Exact exact(problem);
    for (const std::int64_t tokens : kTokenCounts) {
      const Call call{.isa = isa, .tokens = tokens, .has_bias = false, .gap = 3};
      exact.check(call, run_linear(problem, call));
    }
  }
}

TEST_P(Linear, takes_no_rows_and_no_columns) {
  const auto [isa, qtype] = GetParam();
  for (const std::int64_t tokens : {1, 7}) {
    for (const auto& [rows, columns] : {std::pair{0, 5}, {5, 0}}) {
      const Problem problem({qtype, rows, columns, 0, FloatType::kF32}, FloatType::kBF16, tokens);
      const Call call{.isa = isa, .tokens = tokens};
      Exact(problem).check(call, run_linear(problem, call));
    }
  }
}

TEST_P(Linear, gives_the_same_bits_on_any_number_of_threads) {
  const auto [isa, qtype] = GetParam();
  Sample sample;
  for (const WeightSpec& spec : specs_for_threads(qtype)) {
    for (const FloatType type : {FloatType::kF32, FloatType::kBF16}) {
      for (const std::int64_t tokens : {1, 2, 9, 25, 129}) {
        if (!sample.takes_next()) continue;
        const Problem problem(spec, type, tokens);
        const auto one = run_linear(problem, {.isa = isa, .tokens = tokens});
        for (const std::int64_t parts : {2, 3, 7, 13}) {
          const Call call{.isa = isa, .tokens = tokens, .parallel_for = in_parts(parts)};
          EXPECT_EQ(run_linear(problem, call), one) << problem.name(call);
        }
      }
    }
  }
}

TEST_P(Linear, infinities_stay_in_their_token) {
  const auto [isa, qtype] = GetParam();
  for (const FloatType type : kFloatTypes) {
    for (const std::int64_t tokens : {2, 3, 8, 25, 129}) {
      expect_infinities_in_their_token({qtype, 20, 33, 0, FloatType::kF32}, type,
                                       {.isa = isa, .tokens = tokens}, run_linear);
    }
  }
}

TEST_P(Linear, nan_in_a_weight_spoils_its_row_only) {
  const auto [isa, qtype] = GetParam();
  for (const FloatType type : kFloatTypes) {
    for (const std::int64_t tokens : {1, 7, 25, 129}) {
      expect_nan_in_its_row({qtype, 20, 33, 0, FloatType::kF32}, type,
                            {.isa = isa, .tokens = tokens}, run_linear);
    }
  }
}

TEST(DequantizeRows, gives_the_canonical_values) {
  for (const QTypeId qtype : kAllTypes) {
    for (const WeightSpec& spec : odd_specs(qtype)) {
      const RandomWeight weight(spec);
      const std::int64_t rows[] = {spec.rows - 1, 0};
      for (const Edge edge : kEdges) {
        const GuardedPacked packed(weight, edge);
        const GuardedBytes y(2 * spec.columns * 4, edge);
        dequantize_rows(packed.layout, packed.data(), rows, 2, FloatType::kF32, y.data());
        for (std::int64_t i = 0; i < 2 * spec.columns; ++i) {
          const auto exact = weight.parts(rows[i / spec.columns], i % spec.columns);
          EXPECT_NEAR(load_float(y.data(), i, FloatType::kF32), exact.value(),
                      exact.size() * 0x1p-23);
        }
      }
    }
  }
}

TEST_P(Linear, dequantizes_ranges_as_it_does_rows) {
  const auto [isa, qtype] = GetParam();
  Sample sample;
  Edge edge = Edge::kFirst;
  for (const WeightSpec& spec : odd_specs(qtype)) {
    if (!sample.takes_next()) continue;
    edge = edge == Edge::kFirst ? Edge::kLast : Edge::kFirst;
    const GuardedPacked packed(RandomWeight(spec), edge);
    for (const std::int64_t begin : {std::int64_t{0}, spec.rows / 3}) {
      const std::int64_t count = spec.rows - begin - (spec.rows > 4 ? 1 : 0);
      std::vector<std::int64_t> rows;
      for (std::int64_t i = 0; i < count; ++i) rows.push_back(begin + i);
      for (const FloatType type : kFloatTypes) {
        const std::int64_t size = count * spec.columns * size_of(type);
        const GuardedBytes wanted(size), got(size, edge);
        dequantize_rows(packed.layout, packed.data(), rows.data(), count, type, wanted.data());
        dequantize_range(isa, packed.layout, packed.data(), begin, count, type, got.data(),
                         in_parts(2));
        ASSERT_EQ(std::memcmp(got.data(), wanted.data(), size), 0)
            << type_name(qtype) << " " << spec.rows << "x" << spec.columns << " from " << begin;
      }
    }
  }
}

TEST_P(Linear, dequantizes_ranges_of_no_rows) {
  const auto [isa, qtype] = GetParam();
  for (const FloatType type : kFloatTypes) {
    for (const std::int64_t rows : {0, 5, 16}) {
      const GuardedPacked packed(RandomWeight({qtype, rows, 33, 0, FloatType::kF32}));
      for (const std::int64_t begin : {std::int64_t{0}, rows}) {
        const GuardedBytes y(0);
        find_dequantize_range(isa)(packed.layout, packed.data(), begin, begin, begin, type,
                                   y.data());
        dequantize_range(isa, packed.layout, packed.data(), begin, 0, type, y.data(), in_parts(2));
      }
    }
    const GuardedPacked packed(RandomWeight({qtype, 5, 0, 0, FloatType::kF32}));
    const GuardedBytes y(0);
    dequantize_range(isa, packed.layout, packed.data(), 1, 3, type, y.data(), in_parts(2));
  }
}

}  // namespace
}  // namespace quantal::kernels
