#include "kernels/linear.h"

#include <cmath>
#include <cstring>
#include <thread>

#include <gtest/gtest.h>

#include "kernels/guarded_bytes.h"
#include "kernels/sample.h"
#include "kernels/weights.h"

namespace quantal::kernels {
namespace {

struct Case {
  Isa isa;
  WeightSpec spec;
  std::int64_t tokens;
  FloatType type;

  std::string name() const {
    return std::string(isa_name(isa)) + " " + type_name(spec.qtype) + " " + std::to_string(tokens) +
           "x" + std::to_string(spec.rows) + "x" + std::to_string(spec.columns) + " g" +
           std::to_string(spec.group_size) + " type " + std::to_string(static_cast<int>(type));
  }
};

double epsilon_of(FloatType type) {
  return type == FloatType::kF32 ? 0x1p-24 : type == FloatType::kF16 ? 0x1p-11 : 0x1p-8;
}

// Activations, bias and output of one call, all of them against guard pages.
struct Call {
  Case c;
  RandomWeight weight;
  PackedLayout layout;
  GuardedBytes packed, x, bias, y;

  explicit Call(const Case& given)
      : c(given),
        weight(c.spec),
        layout(c.spec),
        packed(layout.size()),
        x(c.tokens * c.spec.columns * size_of(c.type)),
        bias(c.spec.rows * size_of(c.type)),
        y(c.tokens * c.spec.rows * size_of(c.type)) {
    pack(layout, weight.canonical(), packed.data());
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (std::int64_t i = 0; i < c.tokens * c.spec.columns; ++i) {
      store_float(x.data(), i, c.type, normal(random));
    }
    for (std::int64_t i = 0; i < c.spec.rows; ++i) {
      store_float(bias.data(), i, c.type, normal(random));
    }
  }

  void run(const ParallelFor& parallel_for = serial_for) {
    find_linear(c.isa, c.spec)({.layout = &layout,
                                .weight = packed.data(),
                                .tokens = c.tokens,
                                .type = c.type,
                                .x = x.data(),
                                .x_stride = c.spec.columns,
                                .y = y.data(),
                                .y_stride = c.spec.rows,
                                .bias = bias.data()},
                               parallel_for);
  }

  // |y − exact| ≤ γ · Σ|x|·(|scale·code| + |shift|) + the rounding of the output. fp32 sums of n
  // terms err by at most n + 4 roundings: the products, scale, shift and bias are the four.
  void check() const {
    const double gamma = static_cast<double>(c.spec.columns + 4) * 0x1p-24;
    std::vector<double> values(c.spec.rows * c.spec.columns);
    for (std::int64_t i = 0; i < c.spec.rows * c.spec.columns; ++i) {
      values[i] = weight.value(i / c.spec.columns, i % c.spec.columns);
    }
    for (std::int64_t t = 0; t < c.tokens; ++t) {
      for (std::int64_t r = 0; r < c.spec.rows; ++r) {
        double sum = load_float(bias.data(), r, c.type), size = std::abs(sum);
        for (std::int64_t k = 0; k < c.spec.columns; ++k) {
          const double value = load_float(x.data(), t * c.spec.columns + k, c.type);
          const double w = values[r * c.spec.columns + k];
          sum += value * w;
          size += std::abs(value) * (std::abs(w) + 8);  // |shift| is at most 4
        }
        const double got = load_float(y.data(), t * c.spec.rows + r, c.type);
        const double bound = gamma * size + std::abs(sum) * epsilon_of(c.type);
        const bool overflows = c.type == FloatType::kF16 && std::abs(sum) + bound >= 65520;
        if (overflows && std::isinf(got)) continue;
        ASSERT_NEAR(got, sum, bound) << c.name() << " at token " << t << ", row " << r;
      }
    }
  }
};

std::vector<WeightSpec> specs(QTypeId qtype) {
  const bool is_affine = qtype == QTypeId::kInt2 || qtype == QTypeId::kInt4;
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
                                                          {63, 65},
                                                          {65, 127},
                                                          {16, 128},
                                                          {7, 129},
                                                          {127, 255},
                                                          {32, 512},
                                                          {9, 1023}}) {
    all.push_back({qtype, rows, columns, 0, FloatType::kF32});
    if (!is_affine) continue;
    for (const std::int64_t group : {8, 32, 64, 96, 128}) {
      all.push_back(
          {qtype, rows, columns, group, group == 64 ? FloatType::kF16 : FloatType::kBF16});
    }
  }
  return all;
}

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
  for (const WeightSpec& spec : specs(qtype)) {
    for (const std::int64_t tokens : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 17}) {
      for (const FloatType type : {FloatType::kF32, FloatType::kBF16, FloatType::kF16}) {
        if (!sample.takes_next()) continue;
        Call call({isa, spec, tokens, type});
        call.run();
        call.check();
      }
    }
  }
}

TEST_P(Linear, gives_the_same_bits_on_any_number_of_threads) {
  const auto [isa, qtype] = GetParam();
  for (const std::int64_t tokens : {1, 9}) {
    Call one({isa, {qtype, 100, 200, 0, FloatType::kF32}, tokens, FloatType::kF32});
    Call many(one.c);
    one.run();
    many.run([](std::int64_t count, const std::function<void(std::int64_t, std::int64_t)>& body) {
      std::vector<std::thread> threads;
      for (std::int64_t i = 0; i < count; ++i) threads.emplace_back([&, i] { body(i, i + 1); });
      for (auto& thread : threads) thread.join();
    });
    EXPECT_EQ(std::memcmp(one.y.data(), many.y.data(), tokens * 100 * 4), 0);
  }
}

TEST_P(Linear, infinities_stay_in_their_token) {
  const auto [isa, qtype] = GetParam();
  for (const std::int64_t tokens : {2, 8}) {
    Call call({isa, {qtype, 20, 33, 0, FloatType::kF32}, tokens, FloatType::kF32});
    store_float(call.x.data(), 5, FloatType::kF32, INFINITY);
    store_float(call.x.data(), 33 + 5, FloatType::kF32, NAN);
    call.run();
    for (int r = 0; r < 20; ++r) {
      EXPECT_FALSE(std::isfinite(load_float(call.y.data(), r, FloatType::kF32)));
      EXPECT_TRUE(std::isnan(load_float(call.y.data(), 20 + r, FloatType::kF32)));
      if (tokens == 2) continue;
      EXPECT_TRUE(std::isfinite(load_float(call.y.data(), 40 + r, FloatType::kF32)));
    }
  }
}

TEST(DequantizeRows, gives_the_canonical_values) {
  for (const QTypeId qtype : kAllTypes) {
    for (const WeightSpec& spec : specs(qtype)) {
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
  for (const WeightSpec& spec : specs(qtype)) {
    RandomWeight weight(spec);
    std::vector<std::byte> bytes = weight.packed();
    const std::byte* packed = RandomWeight::align(bytes);
    for (const std::int64_t begin : {std::int64_t{0}, spec.rows / 3}) {
      const std::int64_t count = spec.rows - begin - (spec.rows > 4 ? 1 : 0);
      std::vector<std::int64_t> rows;
      for (std::int64_t i = 0; i < count; ++i) rows.push_back(begin + i);
      for (const FloatType type : {FloatType::kF32, FloatType::kBF16, FloatType::kF16}) {
        if (!sample.takes_next()) continue;
        const std::int64_t size = count * spec.columns * size_of(type);
        const GuardedBytes wanted(size), got(size);
        dequantize_rows(PackedLayout(spec), packed, rows.data(), count, type, wanted.data());
        dequantize_range(isa, PackedLayout(spec), packed, begin, count, type, got.data());
        ASSERT_EQ(std::memcmp(got.data(), wanted.data(), size), 0)
            << Case{isa, spec, count, type}.name();
      }
    }
  }
}

TEST(Linear, every_isa_has_a_kernel_for_every_type) {
  for (const Isa isa : supported_isas()) {
    for (const QTypeId qtype : kAllTypes) {
      EXPECT_NE(find_linear(isa, {qtype, 1, 1, 0, FloatType::kF32}), nullptr);
    }
  }
}

}  // namespace
}  // namespace quantal::kernels
