#include "kernels/canonical_linear.h"

#include <array>

#include <gtest/gtest.h>

#include "kernels/exact.h"
#include "kernels/non_finite.h"
#include "kernels/sample.h"

namespace quantal::kernels {
namespace {

// Two have more columns than are fetched ahead, one of them a multiple of 64. The last has more
// rows than a block of one thread.
std::vector<WeightSpec> specs(QTypeId qtype) {
  const std::int64_t group = is_affine(qtype) ? 32 : 0;
  return {{qtype, 1, 1, 0, FloatType::kF32},        {qtype, 17, 31, 0, FloatType::kBF16},
          {qtype, 65, 129, group, FloatType::kF32}, {qtype, 33, 255, group, FloatType::kF16},
          {qtype, 36, 1024, 0, FloatType::kF32},    {qtype, 64, 320, group, FloatType::kBF16},
          {qtype, 4, 40, 0, FloatType::kF32},       {qtype, 12, 2096, 0, FloatType::kF32},
          {qtype, 12, 2176, 0, FloatType::kF32},    {qtype, 300, 1100, group, FloatType::kF32}};
}

// Every activation type, for large weights one of them.
std::vector<FloatType> types_for(const WeightSpec& spec) {
  if (spec.columns > 1000) return {spec.rows > 100 ? FloatType::kF32 : FloatType::kBF16};
  return {std::begin(kFloatTypes), std::end(kFloatTypes)};
}

// With and without bias and strides, in both types of a half for each number of tokens.
Call call_of(Isa isa, FloatType type, std::int64_t tokens) {
  const std::int64_t kind = tokens + static_cast<int>(type);
  return {.isa = isa, .tokens = tokens, .has_bias = kind % 2 == 0, .gap = kind % 3};
}

Call on_two_threads(Call call) {
  call.parallel_for = in_parts(2);
  return call;
}

class CanonicalLinear : public ::testing::TestWithParam<IsaAndType> {};

TEST_P(CanonicalLinear, gives_what_a_packed_weight_gives) {
  const auto [isa, qtype] = GetParam();
  Sample sample;
  for (const WeightSpec& spec : specs(qtype)) {
    for (const FloatType type : types_for(spec)) {
      if (!sample.takes_next()) continue;
      const Problem problem(spec, type, 17);
      for (const std::int64_t tokens : {0, 1, 2, 3, 4, 7, 17}) {
        const Call call = call_of(isa, type, tokens);
        const auto got = run_canonical(problem, on_two_threads(call));
        if (tokens > kFewCanonicalTokens) {
          EXPECT_EQ(got, run_linear(problem, call)) << problem.name(call);
        }
        EXPECT_EQ(run_canonical(problem, call), got) << problem.name(call) << " on one thread";
      }
    }
  }
}

// Rows that lie plainly, longer than a kernel's panel, in groups and not.
TEST_P(CanonicalLinear, of_many_tokens_gives_what_a_packed_weight_gives) {
  const auto [isa, qtype] = GetParam();
  for (const auto& [rows, columns, group] : std::vector<std::array<std::int64_t, 3>>{
           {64, 2144, 0}, {192, 1120, 32}, {320, 96, 96}, {80, 96, 32}, {64, 0, 0}}) {
    if (group > 0 && !is_affine(qtype)) continue;
    const WeightSpec spec{qtype, rows, columns, group, FloatType::kBF16};
    const std::int64_t most = rows > 192 ? 300 : 51;
    const Problem problem(spec, columns < 1000 ? FloatType::kF32 : FloatType::kBF16, most);
    for (const std::int64_t tokens : {std::int64_t{16}, std::int64_t{20}, most}) {
      const Call call{.isa = isa, .tokens = tokens};
      EXPECT_EQ(run_canonical(problem, on_two_threads(call)), run_linear(problem, call))
          << problem.name(call);
      if (find_integer_linear(isa, spec) == nullptr) continue;
      EXPECT_EQ(run_integer_canonical(problem, false, on_two_threads(call)),
                run_integer(problem, false, {.tokens = tokens}))
          << problem.name(call);
    }
  }
}

// A few tokens have kernels of their own, whose sums are in another order.
TEST_P(CanonicalLinear, of_a_few_tokens_is_exact) {
  const auto [isa, qtype] = GetParam();
  Sample sample;
  for (const WeightSpec& spec : specs(qtype)) {
    for (const FloatType type : types_for(spec)) {
      if (!sample.takes_next()) continue;
      const Problem problem(spec, type, kFewCanonicalTokens);
      Problem whole(spec, type, kFewCanonicalTokens);
      whole.make_whole();
      const Exact exact(problem), exact_whole(whole);
      for (std::int64_t tokens = 1; tokens <= kFewCanonicalTokens; ++tokens) {
        const Call call = call_of(isa, type, tokens);
        exact.check(call, run_canonical(problem, call));
        exact_whole.check_whole(call, run_canonical(whole, call));
      }
    }
  }
}

TEST_P(CanonicalLinear, gives_the_bits_of_a_packed_integer_weight) {
  const auto [isa, qtype] = GetParam();
  Sample sample;
  for (const WeightSpec& spec : specs(qtype)) {
    if (find_integer_linear(isa, spec) == nullptr) continue;
    for (const FloatType type : types_for(spec)) {
      if (!sample.takes_next()) continue;
      const Problem problem(spec, type, 17);
      for (const std::int64_t tokens : {0, 1, 2, 3, 4, 7, 17}) {
        const Call call = call_of(isa, type, tokens);
        const bool has_codes = tokens % 3 == 1;
        EXPECT_EQ(run_integer_canonical(problem, has_codes, on_two_threads(call)),
                  run_integer(problem, has_codes, call))
            << problem.name(call);
      }
    }
  }
}

// Rows lie plainly for the kernels of a few tokens.
WeightSpec plain_spec(QTypeId qtype) {
  return {qtype, 20, 96, is_affine(qtype) ? 32 : 0, FloatType::kF32};
}

TEST_P(CanonicalLinear, infinities_stay_in_their_token) {
  const auto [isa, qtype] = GetParam();
  for (const FloatType type : kFloatTypes) {
    for (const std::int64_t tokens : {2, 3, 4, 25}) {
      const Call call{.isa = isa, .tokens = tokens};
      expect_infinities_in_their_token(plain_spec(qtype), type, call, run_canonical);
    }
  }
}

TEST_P(CanonicalLinear, nan_in_a_weight_spoils_its_row_only) {
  const auto [isa, qtype] = GetParam();
  const bool is_integer = find_integer_linear(isa, plain_spec(qtype)) != nullptr;
  const auto integer = [](const Problem& problem, const Call& call) {
    return run_integer_canonical(problem, false, call);
  };
  for (const FloatType type : kFloatTypes) {
    for (const std::int64_t tokens : {1, 2, 3, 4, 25}) {
      const Call call{.isa = isa, .tokens = tokens};
      expect_nan_in_its_row(plain_spec(qtype), type, call, run_canonical);
      if (is_integer) expect_nan_in_its_row(plain_spec(qtype), type, call, integer);
    }
  }
}

// As over a packed weight, whose tests say more.
TEST_P(CanonicalLinear, infinities_in_a_token_are_those_of_a_packed_integer_weight) {
  const auto [isa, qtype] = GetParam();
  if (find_integer_linear(isa, plain_spec(qtype)) == nullptr) return;
  for (const FloatType type : kFloatTypes) {
    for (const std::int64_t tokens : {2, 3, 4, 25}) {
      Problem problem(plain_spec(qtype), type, tokens);
      store_float(problem.x.data(), 5, type, INFINITY);
      store_float(problem.x.data(), 96 + 95, type, NAN);
      const Call call{.isa = isa, .tokens = tokens};
      const auto y = run_integer_canonical(problem, false, call);
      const auto wanted = run_integer(problem, false, call);
      for (std::int64_t i = 0; i < tokens * 20; ++i) {
        const float got = load_float(y.data(), i, type);
        EXPECT_EQ(std::isnan(got), i < 2 * 20L) << problem.name(call) << " at " << i;
        if (i < 2 * 20L) continue;
        EXPECT_EQ(got, load_float(wanted.data(), i, type)) << problem.name(call) << " at " << i;
      }
    }
  }
}

TEST(CanonicalLinearBlocks, takes_a_weight_of_more_than_one_shared_block) {
  const Problem problem({QTypeId::kInt8, 2100, 4200, 0, FloatType::kF32}, FloatType::kF32, 9);
  for (const Isa isa : supported_isas()) {
    if (isa == Isa::kPortable) continue;  // slow, and no different from the others
    const Call call{.isa = isa, .tokens = 9};
    EXPECT_TRUE(run_canonical(problem, on_two_threads(call)) == run_linear(problem, call))
        << isa_name(isa);
  }
}

INSTANTIATE_TEST_SUITE_P(All, CanonicalLinear,
                         ::testing::Combine(::testing::ValuesIn(supported_isas()),
                                            ::testing::ValuesIn(kAllTypes)),
                         name_of);

}  // namespace
}  // namespace quantal::kernels
