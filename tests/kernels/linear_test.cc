#include "kernels/linear.h"

#include <cmath>
#include <cstring>

#include <gtest/gtest.h>

#include "kernels/problem.h"
#include "kernels/sample.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kTokenCounts[] = {0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 17};
constexpr std::int64_t kMostTokens = 17;

/// The results in fp64, and by how much fp32 may miss them.
class Exact {
 public:
  explicit Exact(const Problem& problem) : problem_(problem) {
    const std::int64_t rows = problem.spec.rows, columns = problem.spec.columns;
    std::vector<double> weights(rows * columns), x(columns);
    for (std::int64_t i = 0; i < rows * columns; ++i) {
      weights[i] = problem.weight.value(i / columns, i % columns);
    }
    for (std::int64_t t = 0; t < problem.tokens; ++t) {
      for (std::int64_t k = 0; k < columns; ++k) {
        x[k] = load_float(problem.x.data(), t * columns + k, problem.type);
      }
      for (std::int64_t r = 0; r < rows; ++r) {
        double sum = 0, size = 0;
        for (std::int64_t k = 0; k < columns; ++k) {
          const double w = weights[r * columns + k];
          sum += x[k] * w;
          size += std::abs(x[k]) * (std::abs(w) + 8);  // |shift| is at most 4
        }
        sums_.push_back(sum);
        sizes_.push_back(size);
      }
    }
  }

  // |y − exact| ≤ γ · Σ|x|·(|scale·code| + |shift|) + the rounding of the output. fp32 sums of n
  // terms err by at most n + 4 roundings: the products, scale, shift and bias are the four.
  void check(const Call& call, const std::vector<std::byte>& y) const {
    const double gamma = static_cast<double>(problem_.spec.columns + 4) * 0x1p-24;
    const FloatType type = problem_.type;
    for (std::int64_t i = 0; i < call.tokens * problem_.spec.rows; ++i) {
      const std::int64_t row = i % problem_.spec.rows;
      const double bias = call.has_bias ? load_float(problem_.bias.data(), row, type) : 0;
      const double wanted = sums_[i] + bias, got = load_float(y.data(), i, type);
      const double bound =
          gamma * (sizes_[i] + std::abs(bias)) + std::abs(wanted) * epsilon_of(type);
      const bool overflows = type == FloatType::kF16 && std::abs(wanted) + bound >= 65520;
      if (overflows && std::isinf(got)) continue;
      ASSERT_NEAR(got, wanted, bound) << problem_.name(call) << " at " << i;
    }
  }

 private:
  const Problem& problem_;
  std::vector<double> sums_, sizes_;
};

class Linear : public testing::TestWithParam<std::tuple<Isa, QTypeId>> {};
INSTANTIATE_TEST_SUITE_P(EveryIsa, Linear,
                         testing::Combine(testing::ValuesIn(supported_isas()),
                                          testing::ValuesIn(kAllTypes)),
                         [](const auto& info) {
                           return std::string(isa_name(std::get<0>(info.param))) + "_" +
                                  type_name(std::get<1>(info.param));
                         });

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

TEST_P(Linear, takes_many_tokens) {
  const auto [isa, qtype] = GetParam();
  for (const FloatType type : {FloatType::kF32, FloatType::kBF16}) {
    for (const std::int64_t tokens : {96, 97, 205, 1030}) {
      const Problem problem({qtype, 33, 40, 0, FloatType::kF32}, type, tokens);
      const Call call{.isa = isa, .tokens = tokens};
      Exact(problem).check(call, run_linear(problem, call));
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
  for (const FloatType type : {FloatType::kF32, FloatType::kBF16}) {
    for (const std::int64_t tokens : {1, 2, 9}) {
      const Problem problem({qtype, 200, 100, 0, FloatType::kF32}, type, tokens);
      const auto one = run_linear(problem, {.isa = isa, .tokens = tokens});
      for (const std::int64_t parts : {2, 3, 7, 13}) {
        EXPECT_EQ(
            run_linear(problem, {.isa = isa, .tokens = tokens, .parallel_for = in_parts(parts)}),
            one);
      }
    }
  }
}

TEST_P(Linear, infinities_stay_in_their_token) {
  const auto [isa, qtype] = GetParam();
  for (const FloatType type : kFloatTypes) {
    for (const std::int64_t tokens : {2, 3, 8}) {
      Problem problem({qtype, 20, 33, 0, FloatType::kF32}, type, tokens);
      const auto wanted = run_linear(problem, {.isa = isa, .tokens = tokens});
      store_float(problem.x.data(), 5, type, INFINITY);
      store_float(problem.x.data(), 33 + 32, type, NAN);
      const auto y = run_linear(problem, {.isa = isa, .tokens = tokens});
      for (std::int64_t r = 0; r < 20; ++r) {
        EXPECT_FALSE(std::isfinite(load_float(y.data(), r, type)));
        EXPECT_TRUE(std::isnan(load_float(y.data(), 20 + r, type)));
      }
      const std::int64_t spoilt = 40L * size_of(type);
      EXPECT_TRUE(std::equal(y.begin() + spoilt, y.end(), wanted.begin() + spoilt));
    }
  }
}

// Codes that are no number stay none; the weight is one of them, in one row.
TEST_P(Linear, nan_codes_spoil_their_row_only) {
  const auto [isa, qtype] = GetParam();
  if (qtype == QTypeId::kInt2 || qtype == QTypeId::kInt4 || qtype == QTypeId::kInt8) return;
  const std::uint8_t nan = qtype == QTypeId::kFloat8E4M3FNUZ ? 0x80 : 0x7F;
  for (const FloatType type : kFloatTypes) {
    for (const std::int64_t tokens : {1, 7}) {
      Problem problem({qtype, 20, 33, 0, FloatType::kF32}, type, tokens);
      problem.weight.data[3 * 33 + 6] = nan;
      problem.repack();
      const auto y = run_linear(problem, {.isa = isa, .tokens = tokens});
      for (std::int64_t i = 0; i < tokens * 20; ++i) {
        EXPECT_EQ(std::isnan(load_float(y.data(), i, type)), i % 20 == 3) << i;
      }
    }
  }
}

TEST(DequantizeRows, gives_the_canonical_values) {
  for (const QTypeId qtype : kAllTypes) {
    for (const WeightSpec& spec : odd_specs(qtype)) {
      RandomWeight weight(spec);
      std::vector<std::byte> bytes = weight.packed();
      std::vector<float> out(2 * spec.columns);
      const std::int64_t rows[] = {spec.rows - 1, 0};
      dequantize_rows(PackedLayout(spec), RandomWeight::align(bytes), rows, 2, FloatType::kF32,
                      out.data());
      for (std::int64_t i = 0; i < 2 * spec.columns; ++i) {
        const double exact = weight.value(rows[i / spec.columns], i % spec.columns);
        EXPECT_NEAR(out[i], exact, (std::abs(exact) + 8) * 0x1p-23);
      }
    }
  }
}

TEST_P(Linear, dequantizes_ranges_as_it_does_rows) {
  const auto [isa, qtype] = GetParam();
  Sample sample;
  for (const WeightSpec& spec : odd_specs(qtype)) {
    if (!sample.takes_next()) continue;
    RandomWeight weight(spec);
    std::vector<std::byte> bytes = weight.packed();
    const std::byte* packed = RandomWeight::align(bytes);
    for (const std::int64_t begin : {std::int64_t{0}, spec.rows / 3}) {
      const std::int64_t count = spec.rows - begin - (spec.rows > 4 ? 1 : 0);
      std::vector<std::int64_t> rows;
      for (std::int64_t i = 0; i < count; ++i) rows.push_back(begin + i);
      for (const FloatType type : kFloatTypes) {
        const std::int64_t size = count * spec.columns * size_of(type);
        const GuardedBytes wanted(size), got(size);
        dequantize_rows(PackedLayout(spec), packed, rows.data(), count, type, wanted.data());
        dequantize_range(isa, PackedLayout(spec), packed, begin, count, type, got.data(),
                         in_parts(2));
        ASSERT_EQ(std::memcmp(got.data(), wanted.data(), size), 0)
            << type_name(qtype) << " " << spec.rows << "x" << spec.columns << " from " << begin;
      }
    }
  }
}

}  // namespace
}  // namespace quantal::kernels
