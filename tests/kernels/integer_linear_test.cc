#include "kernels/integer_linear.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <thread>

#include <gtest/gtest.h>

#include "kernels/guarded_bytes.h"
#include "kernels/sample.h"
#include "kernels/weights.h"

namespace quantal::kernels {
namespace {

constexpr FloatType kFloatTypes[] = {FloatType::kF32, FloatType::kBF16, FloatType::kF16};
const std::vector<QTypeId> kIntegerTypes = {QTypeId::kInt2, QTypeId::kInt4, QTypeId::kInt8};

struct Case {
  WeightSpec spec;
  std::int64_t tokens;
  FloatType type;
  bool has_codes = false;  ///< activations are codes already

  std::string name() const {
    return type_name(spec.qtype) + " " + std::to_string(tokens) + "x" + std::to_string(spec.rows) +
           "x" + std::to_string(spec.columns) + " g" + std::to_string(spec.group_size) + " type " +
           std::to_string(static_cast<int>(type)) + (has_codes ? " codes" : "");
  }
};

// Activations, bias and output of one call, all of them against guard pages.
struct Call {
  Case c;
  RandomWeight weight;
  PackedLayout layout;
  GuardedBytes packed, x, codes, bias, y;
  static constexpr float kScale = 0.03F;

  explicit Call(const Case& given)
      : c(given),
        weight(c.spec),
        layout(c.spec),
        packed(layout.size()),
        x(c.tokens * c.spec.columns * size_of(c.type)),
        codes(c.tokens * c.spec.columns),
        bias(c.spec.rows * size_of(c.type)),
        y(c.tokens * c.spec.rows * size_of(c.type)) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (std::int64_t i = 0; i < c.tokens * c.spec.columns; ++i) {
      store_float(x.data(), i, c.type, normal(random));
      codes.data()[i] = static_cast<std::byte>(random());
    }
    for (std::int64_t i = 0; i < c.spec.rows; ++i) {
      store_float(bias.data(), i, c.type, normal(random));
    }
    repack();
  }

  void repack() { pack(layout, weight.canonical(), packed.data()); }

  std::vector<std::byte> run(Isa isa, const ParallelFor& parallel_for = serial_for) {
    IntegerLinearArgs args{.layout = &layout,
                           .weight = packed.data(),
                           .source = {.tokens = c.tokens, .stride = c.spec.columns},
                           .type = c.type,
                           .y = y.data(),
                           .y_stride = c.spec.rows,
                           .bias = bias.data()};
    if (c.has_codes) {
      args.source.codes = reinterpret_cast<const std::int8_t*>(codes.data());
      args.source.scale = kScale;
    } else {
      args.source.x = x.data();
      args.source.type = c.type;
    }
    find_integer_linear(isa, c.spec)(args, parallel_for);
    return {y.data(), y.data() + c.tokens * c.spec.rows * size_of(c.type)};
  }

  // A token's codes by the definition, and its scale.
  std::pair<std::vector<double>, double> token(std::int64_t t) const {
    std::vector<double> values(c.spec.columns);
    float scale = kScale, absmax = 0;
    for (std::int64_t k = 0; k < c.spec.columns; ++k) {
      const std::int64_t i = t * c.spec.columns + k;
      absmax = std::max(absmax, std::abs(load_float(x.data(), i, c.type)));
    }
    if (!c.has_codes) scale = std::max(absmax / 127, std::numeric_limits<float>::min());
    for (std::int64_t k = 0; k < c.spec.columns; ++k) {
      const std::int64_t i = t * c.spec.columns + k;
      values[k] = c.has_codes ? static_cast<std::int8_t>(codes.data()[i])
                              : std::nearbyint(load_float(x.data(), i, c.type) / scale);
    }
    return {values, scale};
  }

  // Against fp64 over the same codes: fp32 rounds once a step of a group or block.
  void check(const std::vector<std::byte>& got) const {
    const double steps = 2.0 * static_cast<double>(layout.groups()) + 6;
    for (std::int64_t t = 0; t < c.tokens; ++t) {
      const auto [values, scale] = token(t);
      for (std::int64_t r = 0; r < c.spec.rows; ++r) {
        double sum = load_float(bias.data(), r, c.type), size = std::abs(sum);
        for (std::int64_t k = 0; k < c.spec.columns; ++k) {
          const double w = weight.value(r, k);
          sum += values[k] * scale * w;
          size += std::abs(values[k] * scale) * (std::abs(w) + 8);  // |shift| is at most 4
        }
        const double y = load_float(got.data(), t * c.spec.rows + r, c.type);
        const double rounding = c.type == FloatType::kF32   ? 0x1p-24
                                : c.type == FloatType::kF16 ? 0x1p-11
                                                            : 0x1p-8;
        const double bound = steps * 0x1p-24 * size + std::abs(sum) * rounding;
        if (c.type == FloatType::kF16 && std::abs(sum) + bound >= 65520 && std::isinf(y)) continue;
        ASSERT_NEAR(y, sum, bound) << c.name() << " at token " << t << ", row " << r;
      }
    }
  }
};

std::vector<WeightSpec> specs(QTypeId qtype) {
  std::vector<WeightSpec> all;
  for (const auto& [rows, columns] :
       std::vector<std::pair<std::int64_t, std::int64_t>>{{1, 1},
                                                          {2, 3},
                                                          {3, 7},
                                                          {5, 15},
                                                          {15, 16},
                                                          {16, 17},
                                                          {17, 31},
                                                          {31, 33},
                                                          {33, 63},
                                                          {16, 128},
                                                          {7, 129},
                                                          {40, 255},
                                                          {32, 512},
                                                          {9, 1300}}) {
    all.push_back({qtype, rows, columns, 0, FloatType::kF32});
    if (qtype == QTypeId::kInt8) continue;
    for (const std::int64_t group : {8, 32, 96, 128}) {
      all.push_back(
          {qtype, rows, columns, group, group == 32 ? FloatType::kF16 : FloatType::kBF16});
    }
  }
  return all;
}

class IntegerLinear : public testing::TestWithParam<std::tuple<Isa, QTypeId>> {};
INSTANTIATE_TEST_SUITE_P(EveryIsa, IntegerLinear,
                         testing::Combine(testing::ValuesIn(supported_isas()),
                                          testing::ValuesIn(kIntegerTypes)),
                         [](const auto& info) {
                           return std::string(isa_name(std::get<0>(info.param))) + "_" +
                                  type_name(std::get<1>(info.param));
                         });

TEST_P(IntegerLinear, is_exact_over_codes) {
  const auto [isa, qtype] = GetParam();
  Sample sample;
  for (const WeightSpec& spec : specs(qtype)) {
    for (const std::int64_t tokens : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 17}) {
      for (const FloatType type : kFloatTypes) {
        for (const bool has_codes : {false, true}) {
          if (!sample.takes_next()) continue;
          Call call({spec, tokens, type, has_codes});
          const auto y = call.run(isa);
          ASSERT_EQ(y, call.run(Isa::kPortable)) << call.c.name();
          if (isa == Isa::kPortable) call.check(y);
        }
      }
    }
  }
}

TEST_P(IntegerLinear, gives_the_same_bits_on_any_number_of_threads) {
  const auto [isa, qtype] = GetParam();
  Call call({{qtype, 100, 200, 0, FloatType::kF32}, 9, FloatType::kF32});
  const auto one = call.run(isa);
  const auto many = call.run(
      isa, [](std::int64_t count, const std::function<void(std::int64_t, std::int64_t)>& body) {
        std::vector<std::thread> threads;
        for (std::int64_t i = 0; i < count; ++i) threads.emplace_back([&, i] { body(i, i + 1); });
        for (auto& thread : threads) thread.join();
      });
  EXPECT_EQ(one, many);
}

// Codes whose products are as large as they get, in rows long enough to overflow one int32 sum.
TEST_P(IntegerLinear, sums_of_the_largest_codes_are_exact) {
  const auto [isa, qtype] = GetParam();
  Sample sample;
  for (const int x : {-128, -127, 127}) {
    for (const std::uint8_t w : {0x80, 0x81, 0x7F, 0xFF}) {
      if (!sample.takes_next()) continue;
      Call call({{qtype, 16, 140000, 0, FloatType::kF32}, 2, FloatType::kF32, true});
      std::fill(call.weight.data.begin(), call.weight.data.end(), w);
      std::memset(call.codes.data(), x, 2 * call.c.spec.columns);
      call.repack();
      const auto y = call.run(isa);
      call.check(y);
      EXPECT_EQ(y, call.run(Isa::kPortable));
    }
  }
}

TEST_P(IntegerLinear, nan_and_infinity_spoil_their_token_only) {
  const auto [isa, qtype] = GetParam();
  Call call({{qtype, 20, 33, 0, FloatType::kF32}, 4, FloatType::kF32});
  store_float(call.x.data(), 5, FloatType::kF32, INFINITY);
  store_float(call.x.data(), 33 + 32, FloatType::kF32, NAN);
  for (int k = 0; k < 33; ++k) store_float(call.x.data(), 66 + k, FloatType::kF32, 0);
  const auto y = call.run(isa);
  for (int r = 0; r < 20; ++r) {
    EXPECT_TRUE(std::isnan(load_float(y.data(), r, FloatType::kF32)));
    EXPECT_TRUE(std::isnan(load_float(y.data(), 20 + r, FloatType::kF32)));
    EXPECT_EQ(load_float(y.data(), 40 + r, FloatType::kF32),
              load_float(call.bias.data(), r, FloatType::kF32));
    EXPECT_TRUE(std::isfinite(load_float(y.data(), 60 + r, FloatType::kF32)));
  }
}

TEST(IntegerLinear, float8_has_no_kernel) {
  for (const Isa isa : supported_isas()) {
    EXPECT_EQ(find_integer_linear(isa, {QTypeId::kFloat8E4M3FN, 1, 1, 0, FloatType::kF32}),
              nullptr);
  }
}

}  // namespace
}  // namespace quantal::kernels
