// Linears of many tokens, over rows that take more than one panel, strip and block of a kernel.
#include <gtest/gtest.h>

#include "kernels/exact.h"
#include "kernels/sample.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kTokenCounts[] = {33, 129, 255};
constexpr std::int64_t kMostTokens = 255;

// Rows of 1023 columns and more. Groups end within a panel of 128, 256 or 512 columns and at its
// end, and are more than a panel takes; the last one is whole or short.
std::vector<WeightSpec> long_rows(QTypeId qtype) {
  if (!is_affine(qtype)) {
    return {{qtype, 33, 1023, 0, FloatType::kF32}, {qtype, 17, 2100, 0, FloatType::kBF16}};
  }
  return {{qtype, 33, 1024, 32, FloatType::kF32}, {qtype, 19, 1100, 128, FloatType::kBF16},
          {qtype, 18, 1055, 32, FloatType::kF16}, {qtype, 15, 1023, 96, FloatType::kF32},
          {qtype, 16, 1030, 8, FloatType::kBF16}, {qtype, 17, 1500, 0, FloatType::kF32}};
}

// More than 125 tokens are more than kStripBytes of AVX-512, more than 251 in bf16.
WeightSpec longest_rows(QTypeId qtype) {
  return {qtype, 1, 16700, is_affine(qtype) ? 128 : 0, FloatType::kF32};
}

// Small weights, whose tokens are what counts.
std::vector<WeightSpec> small_weights(QTypeId qtype) {
  std::vector<WeightSpec> all = {{qtype, 33, 40, 0, FloatType::kF32}};
  if (is_affine(qtype)) all.push_back({qtype, 17, 70, 32, FloatType::kF32});
  return all;
}

constexpr std::int64_t kAllTokenCounts[] = {1,  2,  3,  5,  7,   15,  16,  17,  31,   33,
                                            63, 65, 96, 97, 127, 129, 205, 255, 1023, 1030};

class ManyTokens : public testing::TestWithParam<IsaAndType> {};
INSTANTIATE_TEST_SUITE_P(EveryIsa, ManyTokens,
                         testing::Combine(testing::ValuesIn(supported_isas()),
                                          testing::ValuesIn(kAllTypes)),
                         name_of);

// With and without bias and strides.
constexpr std::int64_t kWithoutBias = 129;
Call call_of(Isa isa, std::int64_t tokens) {
  return {.isa = isa,
          .tokens = tokens,
          .has_bias = tokens != kWithoutBias,
          .gap = tokens == 33 ? 0 : 3};
}

TEST_P(ManyTokens, by_long_rows_are_exact_in_whole_numbers) {
  const auto [isa, qtype] = GetParam();
  if (isa == Isa::kPortable) return;  // has no panels
  Sample sample;
  for (const WeightSpec& spec : long_rows(qtype)) {
    for (const FloatType type : kFloatTypes) {
      if (!sample.takes_next()) continue;
      Problem problem(spec, type, kMostTokens);
      problem.make_whole();
      const Exact exact(problem);
      for (const std::int64_t tokens : kTokenCounts) {
        const Call call = call_of(isa, tokens);
        exact.check_whole(call, run_linear(problem, call));
      }
    }
  }
}

TEST_P(ManyTokens, by_the_longest_rows_are_exact_in_whole_numbers) {
  const auto [isa, qtype] = GetParam();
  if (isa == Isa::kPortable) return;
  if (qtype > QTypeId::kFloat8E4M3FN) return;  // as with that
  Sample sample;
  for (const auto& [type, tokens] : {std::pair{FloatType::kF32, 129}, {FloatType::kBF16, 255}}) {
    if (!sample.takes_next()) continue;
    Problem problem(longest_rows(qtype), type, tokens);
    problem.make_whole();
    const Call call = call_of(isa, tokens);
    Exact(problem).check_whole(call, run_linear(problem, call));
  }
}

TEST_P(ManyTokens, of_any_number_are_exact_in_whole_numbers) {
  const auto [isa, qtype] = GetParam();
  Sample sample;
  for (const WeightSpec& spec : small_weights(qtype)) {
    for (const FloatType type : kFloatTypes) {
      Problem problem(spec, type, 1030);
      problem.make_whole();
      const Exact exact(problem);
      for (const std::int64_t tokens : kAllTokenCounts) {
        if (!sample.takes_next()) continue;
        const Call call = call_of(isa, tokens);
        exact.check_whole(call, run_linear(problem, call));
      }
    }
  }
}

// More tiles than a kernel takes at once, by more tokens than stay in a near cache: threads may
// share out tokens, too.
TEST_P(ManyTokens, by_many_rows_are_exact_in_whole_numbers) {
  const auto [isa, qtype] = GetParam();
  if (isa == Isa::kPortable) return;
  for (const auto& [type, tokens] : {std::pair{FloatType::kF32, 515}, {FloatType::kBF16, 300}}) {
    Problem problem({qtype, 530, 40, is_affine(qtype) ? 32 : 0, FloatType::kF32}, type, tokens);
    problem.make_whole();
    const Exact exact(problem);
    for (const int threads : {1, 2, 3, 7}) {
      const Call call{.isa = isa, .tokens = tokens, .gap = 1, .parallel_for = in_parts(threads)};
      exact.check_whole(call, run_linear(problem, call));
    }
  }
}

// Parts of small numbers are smaller still (kernels that take numbers apart).
TEST_P(ManyTokens, of_small_numbers_are_as_exact_as_fp32) {
  const auto [isa, qtype] = GetParam();
  for (const FloatType type : {FloatType::kF32, FloatType::kBF16}) {
    for (const float factor : {0x1p-1F, 0x1p-40F, 0x1p-110F, 0x1p-125F}) {
      Problem problem({qtype, 17, 70, 0, FloatType::kF32}, type, 25);
      for (std::int64_t i = 0; i < 25 * 70; ++i) {
        const float x = load_float(problem.x.data(), i, type);
        store_float(problem.x.data(), i, type, x * factor);
      }
      const Exact exact(problem);
      for (const std::int64_t tokens : {7, 25}) {
        const Call call{.isa = isa, .tokens = tokens, .has_bias = false};
        exact.check(call, run_linear(problem, call));
      }
    }
  }
}

TEST_P(ManyTokens, are_as_exact_as_fp32) {
  const auto [isa, qtype] = GetParam();
  for (const FloatType type : kFloatTypes) {
    const Problem problem(small_weights(qtype).back(), type, kMostTokens);
    const Exact exact(problem);
    for (const std::int64_t tokens : kTokenCounts) {
      const Call call = call_of(isa, tokens);
      exact.check(call, run_linear(problem, call));
    }
  }
}

class ManyIntegerTokens : public testing::TestWithParam<IsaAndType> {
 protected:
  // The first of the tokens of a problem have the bits of the portable kernel.
  static void expect_exact(const Problem& problem, bool has_codes,
                           const std::vector<std::int64_t>& counts) {
    for (const bool has_bias : {false, true}) {
      const Call all{.tokens = has_bias ? problem.tokens : kWithoutBias, .has_bias = has_bias};
      const auto wanted = run_integer(problem, has_codes, all);
      for (const std::int64_t tokens : counts) {
        const Call call = call_of(std::get<0>(GetParam()), tokens);
        if (call.has_bias != has_bias) continue;
        const auto y = run_integer(problem, has_codes, call);
        ASSERT_EQ(y.size(), tokens * problem.spec.rows * size_of(problem.type));
        ASSERT_TRUE(std::equal(y.begin(), y.end(), wanted.begin())) << problem.name(call);
      }
    }
  }
};
INSTANTIATE_TEST_SUITE_P(EveryIsa, ManyIntegerTokens,
                         testing::Combine(testing::ValuesIn(supported_isas()),
                                          testing::Values(QTypeId::kInt2, QTypeId::kInt4,
                                                          QTypeId::kInt8)),
                         name_of);

TEST_P(ManyIntegerTokens, by_long_rows_have_the_bits_of_the_portable_kernel) {
  const auto [isa, qtype] = GetParam();
  if (isa == Isa::kPortable) return;
  Sample sample;
  int number = 0;
  for (const WeightSpec& spec : long_rows(qtype)) {
    if (!sample.takes_next()) continue;
    expect_exact(Problem(spec, kFloatTypes[number % 3], kMostTokens), number % 2 == 0,
                 {std::begin(kTokenCounts), std::end(kTokenCounts)});
    ++number;
  }
}

// More columns than an int32 sum holds, too.
TEST_P(ManyIntegerTokens, by_the_longest_rows_have_the_bits_of_the_portable_kernel) {
  const auto [isa, qtype] = GetParam();
  if (isa == Isa::kPortable) return;
  WeightSpec spec = longest_rows(qtype);
  spec.columns = 33300;
  spec.group_size = 0;
  const Problem problem(spec, FloatType::kF32, kMostTokens);
  const Call call = call_of(isa, kMostTokens);
  Call portable = call;
  portable.isa = Isa::kPortable;
  EXPECT_TRUE(run_integer(problem, true, call) == run_integer(problem, true, portable));
}

TEST_P(ManyIntegerTokens, of_any_number_have_the_bits_of_the_portable_kernel) {
  const auto [isa, qtype] = GetParam();
  if (isa == Isa::kPortable) return;
  Sample sample;
  for (const WeightSpec& spec : small_weights(qtype)) {
    for (const FloatType type : kFloatTypes) {
      if (!sample.takes_next()) continue;
      expect_exact(Problem(spec, type, 1030), type == FloatType::kBF16,
                   {std::begin(kAllTokenCounts), std::end(kAllTokenCounts)});
    }
  }
}

}  // namespace
}  // namespace quantal::kernels
