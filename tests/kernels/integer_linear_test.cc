#include "kernels/integer_linear.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include <gtest/gtest.h>

#include "kernels/conv_patches.h"
#include "kernels/exact.h"
#include "kernels/non_finite.h"
#include "kernels/sample.h"

namespace quantal::kernels {
namespace {

const std::vector<QTypeId> kIntegerTypes = {QTypeId::kInt2, QTypeId::kInt4, QTypeId::kInt8};
constexpr std::int64_t kTokenCounts[] = {0, 1, 2, 3, 4, 5, 8, 9, 12, 17, 25};
constexpr std::int64_t kMostTokens = 25;

// A token's codes by the definition, and its scale.
std::pair<std::vector<double>, double> token_of(const Problem& problem, bool has_codes,
                                                std::int64_t t) {
  const std::int64_t columns = problem.spec.columns;
  std::vector<double> values(columns);
  float scale = kCodeScale, absmax = 0;
  for (std::int64_t i = t * columns; i < (t + 1) * columns; ++i) {
    absmax = std::max(absmax, std::abs(load_float(problem.x.data(), i, problem.type)));
  }
  if (!has_codes) scale = std::max(absmax / 127, std::numeric_limits<float>::min());
  for (std::int64_t k = 0; k < columns; ++k) {
    const std::int64_t i = t * columns + k;
    values[k] = has_codes ? problem.codes[i]
                          : std::nearbyint(load_float(problem.x.data(), i, problem.type) / scale);
  }
  return {values, scale};
}

// All tokens against fp64 over the same codes: fp32 rounds once a step of a group or block.
void check(const Problem& problem, bool has_codes, const std::vector<std::byte>& y) {
  const std::int64_t rows = problem.spec.rows, columns = problem.spec.columns;
  const FloatType type = problem.type;
  std::vector<double> weights(rows * columns), sizes(rows * columns);
  for (std::int64_t i = 0; i < rows * columns; ++i) {
    const auto parts = problem.weight.parts(i / columns, i % columns);
    weights[i] = parts.value();
    sizes[i] = parts.size();
  }
  const std::int64_t blocks = columns / kBlockColumns + 1;
  const double steps = 2.0 * static_cast<double>(problem.layout.groups() * blocks) + 6;
  for (std::int64_t t = 0; t < problem.tokens; ++t) {
    const auto [values, scale] = token_of(problem, has_codes, t);
    for (std::int64_t r = 0; r < rows; ++r) {
      double sum = load_float(problem.bias.data(), r, type), size = std::abs(sum);
      for (std::int64_t k = 0; k < columns; ++k) {
        sum += values[k] * scale * weights[r * columns + k];
        size += std::abs(values[k] * scale) * sizes[r * columns + k];
      }
      const double got = load_float(y.data(), t * rows + r, type);
      const double bound = steps * (0x1p-24 * size + 0x1p-150) + rounding_of(type, sum);
      if (type == FloatType::kF16 && std::abs(sum) + bound >= 65520 && std::isinf(got)) continue;
      ASSERT_NEAR(got, sum, bound) << "token " << t << ", row " << r;
    }
  }
}

class IntegerLinear : public testing::TestWithParam<IsaAndType> {};
INSTANTIATE_TEST_SUITE_P(EveryIsa, IntegerLinear,
                         testing::Combine(testing::ValuesIn(supported_isas()),
                                          testing::ValuesIn(kIntegerTypes)),
                         name_of);

TEST_P(IntegerLinear, is_exact_over_codes) {
  const auto [isa, qtype] = GetParam();
  Sample sample;
  for (const WeightSpec& spec : odd_specs(qtype)) {
    for (const FloatType type : kFloatTypes) {
      if (!sample.takes_next()) continue;
      const Problem problem(spec, type, kMostTokens);
      for (const bool has_codes : {false, true}) {
        if (has_codes && type == FloatType::kF16) continue;  // as with kBF16
        const auto wanted = run_integer(problem, has_codes, {.tokens = kMostTokens});
        if (isa == Isa::kPortable) {
          check(problem, has_codes, wanted);
          continue;
        }
        for (const std::int64_t tokens : kTokenCounts) {
          const Call call{.isa = isa, .tokens = tokens};
          const auto y = run_integer(problem, has_codes, call);
          ASSERT_EQ(y.size(), tokens * spec.rows * size_of(type));
          ASSERT_TRUE(std::equal(y.begin(), y.end(), wanted.begin())) << problem.name(call);
        }
      }
    }
  }
}

TEST_P(IntegerLinear, takes_strides_no_bias_and_many_tokens) {
  const auto [isa, qtype] = GetParam();
  Sample sample;
  for (const FloatType type : kFloatTypes) {
    for (const bool has_codes : {false, true}) {
      for (const std::int64_t tokens : {1, 7, 96, 205, 1030}) {
        if (!sample.takes_next()) continue;
        const Problem problem({qtype, 37, 40, 0, FloatType::kF32}, type, tokens);
        const Call call{.isa = isa, .tokens = tokens, .has_bias = false, .gap = 3};
        ASSERT_EQ(run_integer(problem, has_codes, call),
                  run_integer(problem, has_codes, {.tokens = tokens, .has_bias = false}))
            << problem.name(call);
      }
    }
  }
}

// The codes that quantizing its numbers gives; false where one is NaN.
std::vector<std::int8_t> codes_of(const Problem& problem, bool has_codes, const Call& call,
                                  float scale, bool* found) {
  const GuardedBytes codes(call.tokens * problem.spec.rows);
  problem.run(call, has_codes, [&](const Operands& operands) {
    IntegerLinearArgs args = integer_args(problem, has_codes, call, operands);
    args.weight = operands.weight;
    auto* to = reinterpret_cast<std::int8_t*>(codes.data());
    *found = integer_linear_codes(call.isa, args, scale, to, call.parallel_for);
  });
  const auto* first = reinterpret_cast<const std::int8_t*>(codes.data());
  return {first, first + codes.size()};
}

TEST_P(IntegerLinear, gives_codes_of_its_numbers) {
  const auto [isa, qtype] = GetParam();
  constexpr float kScale = 0.21F;
  Sample sample;
  // The last one has more tokens than a block.
  for (const auto& [rows, columns, tokens] : std::vector<std::array<std::int64_t, 3>>{
           {37, 65, 12}, {0, 5, 3}, {5, 0, 3}, {5, 33, 0}, {4200, 8, 300}}) {
    for (const FloatType type : kFloatTypes) {
      if (!sample.takes_next()) continue;
      if (tokens > 256 && type != FloatType::kF32) continue;
      const Problem problem({qtype, rows, columns, 0, FloatType::kF32}, type, tokens);
      for (const bool has_codes : {false, true}) {
        const Call call{.isa = isa, .tokens = tokens, .parallel_for = in_parts(2)};
        const Call strided{.isa = isa, .tokens = tokens, .has_bias = true, .gap = 3};
        std::vector<std::int8_t> wanted(tokens * rows);
        const auto y = run_integer(problem, has_codes, call);
        ASSERT_TRUE(
            quantize_codes(Isa::kPortable, y.data(), type, tokens * rows, kScale, wanted.data()));
        bool found = false;
        EXPECT_EQ(codes_of(problem, has_codes, call, kScale, &found), wanted);
        EXPECT_TRUE(found) << problem.name(call);
        EXPECT_EQ(codes_of(problem, has_codes, strided, kScale, &found), wanted);
        EXPECT_TRUE(found) << problem.name(strided);
      }
    }
  }
}

// More positions than a block has tokens: the patches of each are found.
TEST_P(IntegerLinear, gives_codes_of_patches) {
  const auto [isa, qtype] = GetParam();
  const ConvShape shape{
      .rows = 4200, .input = {1, 18, 18}, .kernel = {1, 3, 3}, .padding = {0, 1, 1}};
  const Problem problem({qtype, shape.rows, shape.columns(), 0, FloatType::kF32}, FloatType::kF32,
                        shape.pixels());
  const CodePatches patches{.shape = &shape, .input = problem.codes.data()};
  const std::int64_t tokens = shape.positions(), stride = shape.columns() + kPatchSlack;
  std::vector<std::int8_t> written(tokens * stride);
  write_patches(shape, patches.input, 0, tokens, written.data(), stride);
  IntegerLinearArgs args{.layout = &problem.layout,
                         .weight = problem.packed_last.data(),
                         .source = {.tokens = tokens, .scale = kCodeScale, .patches = &patches}};
  std::vector<std::int8_t> codes(tokens * shape.rows), wanted(tokens * shape.rows);
  ASSERT_TRUE(integer_linear_codes(isa, args, 0.21F, codes.data(), in_parts(2)));
  args.source = {.tokens = tokens, .stride = stride, .codes = written.data(), .scale = kCodeScale};
  ASSERT_TRUE(integer_linear_codes(isa, args, 0.21F, wanted.data()));
  EXPECT_EQ(codes, wanted);
}

TEST_P(IntegerLinear, gives_no_codes_of_nan) {
  const auto [isa, qtype] = GetParam();
  for (const FloatType type : kFloatTypes) {
    Problem problem({qtype, 20, 33, 0, FloatType::kF32}, type, 9);
    store_float(problem.x.data(), 33 * 7 + 2, type, NAN);
    bool found = true;
    codes_of(problem, false, {.isa = isa, .tokens = 9}, 0.1F, &found);
    EXPECT_FALSE(found);
  }
}

TEST_P(IntegerLinear, takes_no_rows_and_no_columns) {
  const auto [isa, qtype] = GetParam();
  for (const std::int64_t tokens : {1, 7}) {
    for (const auto& [rows, columns] : {std::pair{0, 5}, {5, 0}}) {
      const Problem problem({qtype, rows, columns, 0, FloatType::kF32}, FloatType::kF32, tokens);
      EXPECT_EQ(run_integer(problem, false, {.isa = isa, .tokens = tokens}),
                run_integer(problem, false, {.tokens = tokens}));
    }
  }
}

TEST_P(IntegerLinear, gives_the_same_bits_on_any_number_of_threads) {
  const auto [isa, qtype] = GetParam();
  Sample sample;
  for (const WeightSpec& spec : specs_for_threads(qtype)) {
    for (const std::int64_t tokens : {1, 2, 9, 25, 129}) {
      if (!sample.takes_next()) continue;
      const Problem problem(spec, FloatType::kF32, tokens);
      const auto one = run_integer(problem, false, {.isa = isa, .tokens = tokens});
      for (const std::int64_t parts : {2, 3, 7, 13}) {
        const Call call{.isa = isa, .tokens = tokens, .parallel_for = in_parts(parts)};
        EXPECT_EQ(run_integer(problem, false, call), one) << problem.name(call);
      }
    }
  }
}

// Codes whose products are as large as they get, in rows long enough to overflow one int32 sum.
TEST_P(IntegerLinear, sums_of_the_largest_codes_are_exact) {
  const auto [isa, qtype] = GetParam();
  Sample sample;
  for (const int x : {-128, -127, 127}) {
    for (const std::uint8_t w : {0x80, 0x81, 0x7F, 0xFF}) {
      if (!sample.takes_next()) continue;
      const std::int64_t tokens = x == -128 && w == 0x80 ? 25 : x == 127 ? 5 : 2;
      Problem problem({qtype, 3, 70000, 0, FloatType::kF32}, FloatType::kF32, tokens);
      std::ranges::fill(problem.weight.data, w);
      std::ranges::fill(problem.codes, static_cast<std::int8_t>(x));
      problem.repack();
      const auto y = run_integer(problem, true, {.isa = isa, .tokens = tokens});
      check(problem, true, y);
      EXPECT_EQ(y, run_integer(problem, true, {.tokens = tokens}));
    }
  }
}

// Groups of more columns than an int32 sum takes, of which the last one has no second part.
TEST_P(IntegerLinear, long_groups_with_a_short_last_one_are_exact) {
  const auto [isa, qtype] = GetParam();
  if (!is_affine(qtype)) return;
  for (const std::int64_t tokens : {5, 40}) {
    const Problem problem({qtype, 3, 40100, 40000, FloatType::kF32}, FloatType::kF32, tokens);
    EXPECT_EQ(run_integer(problem, false, {.isa = isa, .tokens = tokens}),
              run_integer(problem, false, {.tokens = tokens}));
  }
}

// Largest and least codes in any order: what a sum of 16 bits on the way would saturate.
TEST_P(IntegerLinear, extreme_codes_side_by_side_are_exact) {
  const auto [isa, qtype] = GetParam();
  constexpr std::int8_t kCodes[] = {-128, -127, 127, 0};
  constexpr std::uint8_t kWeights[] = {0x80, 0x81, 0x7F, 0xFF, 0x00};
  for (const std::int64_t group : {0, 32}) {
    if (group > 0 && !is_affine(qtype)) continue;
    for (const std::int64_t tokens : {1, 3, 4, 8, 13, 25}) {
      Problem problem({qtype, 33, 517, group, FloatType::kF32}, FloatType::kF32, tokens);
      std::mt19937 random(2);
      for (auto& code : problem.codes) code = kCodes[random() % 4];
      for (auto& code : problem.weight.data) code = kWeights[random() % 5];
      problem.repack();
      EXPECT_EQ(run_integer(problem, true, {.isa = isa, .tokens = tokens}),
                run_integer(problem, true, {.tokens = tokens}));
    }
  }
}

// A code depends on the last bit of the quotient there.
TEST_P(IntegerLinear, numbers_between_two_codes_have_the_bits_of_the_portable_kernel) {
  const auto [isa, qtype] = GetParam();
  constexpr std::int64_t kColumns = 256 * 5;
  for (const FloatType type : kFloatTypes) {
    Problem problem({qtype, 16, kColumns, 0, FloatType::kF32}, type, kMostTokens);
    for (std::int64_t t = 0; t < kMostTokens; ++t) {
      const float factor = t == 0 ? 0x1p-126F : t == 1 ? 0x1p110F : 1;
      const float most = factor * static_cast<float>(1 + t * 0.37);
      const float scale = std::max(most / 127, std::numeric_limits<float>::min());
      store_float(problem.x.data(), t * kColumns, type, most);
      for (std::int64_t i = 1; i < kColumns; ++i) {
        float x = (static_cast<float>(i / 5) - 127.5F) * scale;
        for (std::int64_t steps = i % 5; steps > 2; --steps) x = std::nextafter(x, -most);
        for (std::int64_t steps = i % 5; steps < 2; ++steps) x = std::nextafter(x, most);
        store_float(problem.x.data(), t * kColumns + i, type, std::clamp(x, -most, most));
      }
    }
    Call call{.isa = isa, .tokens = kMostTokens};
    const auto y = run_integer(problem, false, call);
    call.isa = Isa::kPortable;
    EXPECT_TRUE(y == run_integer(problem, false, call)) << problem.name(call);
  }
}

TEST_P(IntegerLinear, nan_and_infinity_spoil_their_token_only) {
  const auto [isa, qtype] = GetParam();
  for (const FloatType type : kFloatTypes) {
    for (const std::int64_t tokens : {4, 25, 129}) {
      const WeightSpec spec{qtype, 20, 33, 0, FloatType::kF32};
      Problem problem(spec, type, tokens);
      const auto clean = run_integer(problem, false, {.isa = isa, .tokens = tokens});
      const std::int64_t zeros = tokens - 2, spoilt[] = {0, 1, tokens - 1};
      for (std::int64_t k = 0; k < 33; ++k) store_float(problem.x.data(), zeros * 33 + k, type, 0);
      store_float(problem.x.data(), 5, type, INFINITY);
      store_float(problem.x.data(), 33 + 32, type, NAN);
      store_float(problem.x.data(), (tokens - 1) * 33, type, -INFINITY);
      const auto y = run_integer(problem, false, {.isa = isa, .tokens = tokens});
      for (std::int64_t i = 0; i < tokens * 20; ++i) {
        const float got = load_float(y.data(), i, type);
        if (std::ranges::count(spoilt, i / 20) > 0) {
          EXPECT_TRUE(std::isnan(got)) << i;
        } else if (i / 20 == zeros) {
          EXPECT_EQ(got, load_float(problem.bias.data(), i % 20, type)) << i;
        } else {
          EXPECT_EQ(got, load_float(clean.data(), i, type)) << i;
        }
      }
    }
  }
}

TEST_P(IntegerLinear, nan_in_a_weight_spoils_its_row_only) {
  const auto [isa, qtype] = GetParam();
  for (const bool has_codes : {false, true}) {
    const auto run = [has_codes](const Problem& problem, const Call& call) {
      return run_integer(problem, has_codes, call);
    };
    for (const std::int64_t tokens : {1, 7, 25, 129}) {
      expect_nan_in_its_row({qtype, 20, 33, 0, FloatType::kF32}, FloatType::kBF16,
                            {.isa = isa, .tokens = tokens}, run);
    }
  }
}

}  // namespace
}  // namespace quantal::kernels
