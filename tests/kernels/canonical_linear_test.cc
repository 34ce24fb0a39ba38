#include "kernels/canonical_linear.h"

#include <cmath>
#include <cstring>
#include <thread>

#include <gtest/gtest.h>

#include "kernels/guarded_bytes.h"
#include "kernels/weights.h"

namespace quantal::kernels {
namespace {

void two_threads(std::int64_t count, const std::function<void(std::int64_t, std::int64_t)>& body) {
  std::thread other([&] { body(0, count / 2); });
  body(count / 2, count);
  other.join();
}

// The last has more rows than a block of one thread.
std::vector<WeightSpec> specs(QTypeId qtype) {
  const std::int64_t group = qtype == QTypeId::kInt2 || qtype == QTypeId::kInt4 ? 32 : 0;
  return {{qtype, 1, 1, 0, FloatType::kF32},        {qtype, 17, 31, 0, FloatType::kBF16},
          {qtype, 65, 129, group, FloatType::kF32}, {qtype, 33, 255, group, FloatType::kF16},
          {qtype, 36, 1024, 0, FloatType::kF32},    {qtype, 64, 320, group, FloatType::kBF16},
          {qtype, 4, 40, 0, FloatType::kF32},       {qtype, 300, 1100, group, FloatType::kF32}};
}

struct Call {
  WeightSpec spec;
  std::int64_t tokens;
  RandomWeight weight;
  PackedLayout layout;
  std::vector<std::byte> packed;
  GuardedBytes data, x, bias, y;

  Call(const WeightSpec& s, std::int64_t count)
      : spec(s),
        tokens(count),
        weight(s),
        layout(s),
        packed(weight.packed()),
        data(weight.data.size()),
        x(count * s.columns * 4),
        bias(s.rows * 4),
        y(count * s.rows * 4) {
    std::memcpy(data.data(), weight.data.data(), weight.data.size());
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (std::int64_t i = 0; i < count * s.columns; ++i) {
      store_float(x.data(), i, FloatType::kF32, normal(random));
    }
    for (std::int64_t i = 0; i < s.rows; ++i) {
      store_float(bias.data(), i, FloatType::kF32, normal(random));
    }
  }

  CanonicalWeight canonical() const {
    CanonicalWeight all = weight.canonical();
    all.data = reinterpret_cast<const std::uint8_t*>(data.data());
    return all;
  }

  LinearArgs float_args() {
    return {.layout = &layout,
            .weight = RandomWeight::align(packed),
            .tokens = tokens,
            .x = x.data(),
            .x_stride = spec.columns,
            .y = y.data(),
            .y_stride = spec.rows,
            .bias = bias.data()};
  }
  IntegerLinearArgs integer_args() {
    return {.layout = &layout,
            .weight = RandomWeight::align(packed),
            .source = {.tokens = tokens, .x = x.data(), .stride = spec.columns},
            .y = y.data(),
            .y_stride = spec.rows,
            .bias = bias.data()};
  }

  // Sums in another order: each may miss the exact one by γ · Σ|x|·|w|.
  void check_close(const std::vector<std::byte>& got, const std::vector<std::byte>& wanted) const {
    const double gamma = static_cast<double>(spec.columns + 4) * 0x1p-24;
    for (std::int64_t i = 0; i < tokens * spec.rows; ++i) {
      double size = std::abs(load_float(bias.data(), i % spec.rows, FloatType::kF32));
      for (std::int64_t k = 0; k < spec.columns; ++k) {
        const double value =
            load_float(x.data(), i / spec.rows * spec.columns + k, FloatType::kF32);
        size += std::abs(value) * (std::abs(weight.value(i % spec.rows, k)) + 8);
      }
      ASSERT_NEAR(load_float(got.data(), i, FloatType::kF32),
                  load_float(wanted.data(), i, FloatType::kF32), 2 * gamma * size)
          << spec.rows << 'x' << spec.columns << ' ' << tokens << " at " << i;
    }
  }

  std::vector<std::byte> result() {
    std::vector<std::byte> bytes(y.data(), y.data() + tokens * spec.rows * 4);
    std::memset(y.data(), 0xAA, bytes.size());
    return bytes;
  }
};

using IsaAndType = std::tuple<Isa, QTypeId>;
class CanonicalLinear : public ::testing::TestWithParam<IsaAndType> {};

TEST_P(CanonicalLinear, gives_what_a_packed_weight_gives) {
  const auto [isa, qtype] = GetParam();
  for (const WeightSpec& spec : specs(qtype)) {
    for (const std::int64_t tokens : {0, 1, 2, 3, 4, 7, 17}) {
      Call call(spec, tokens);
      find_linear(isa, spec)(call.float_args(), serial_for);
      const auto wanted = call.result();
      LinearArgs args = call.float_args();
      args.weight = nullptr;
      linear_from_canonical(isa, args, call.canonical(), two_threads);
      const auto got = call.result();
      if (tokens > kFewCanonicalTokens) {
        EXPECT_EQ(got, wanted) << spec.rows << 'x' << spec.columns << ' ' << tokens;
      } else {
        call.check_close(got, wanted);
      }
      linear_from_canonical(isa, args, call.canonical(), serial_for);
      EXPECT_EQ(call.result(), got) << "on one thread";
    }
  }
}

TEST_P(CanonicalLinear, gives_the_bits_of_a_packed_integer_weight) {
  const auto [isa, qtype] = GetParam();
  for (const WeightSpec& spec : specs(qtype)) {
    if (find_integer_linear(isa, spec) == nullptr) continue;
    for (const std::int64_t tokens : {0, 1, 4, 7, 17}) {
      Call call(spec, tokens);
      find_integer_linear(isa, spec)(call.integer_args(), serial_for);
      const auto wanted = call.result();
      IntegerLinearArgs args = call.integer_args();
      args.weight = nullptr;
      integer_linear_from_canonical(isa, args, call.canonical(), two_threads);
      EXPECT_EQ(call.result(), wanted) << spec.rows << 'x' << spec.columns << ' ' << tokens;
    }
  }
}

TEST(CanonicalLinearBlocks, takes_a_weight_of_more_than_one_shared_block) {
  const WeightSpec spec{QTypeId::kInt8, 2100, 4200, 0, FloatType::kF32};
  for (const Isa isa : supported_isas()) {
    if (isa == Isa::kPortable) continue;  // slow, and no different from the others
    Call call(spec, 9);
    find_linear(isa, spec)(call.float_args(), serial_for);
    const auto wanted = call.result();
    linear_from_canonical(isa, call.float_args(), call.canonical(), two_threads);
    EXPECT_EQ(call.result(), wanted) << isa_name(isa);
  }
}

INSTANTIATE_TEST_SUITE_P(All, CanonicalLinear,
                         ::testing::Combine(::testing::ValuesIn(supported_isas()),
                                            ::testing::ValuesIn(kAllTypes)),
                         [](const auto& info) {
                           return std::string(isa_name(std::get<0>(info.param))) + "_" +
                                  type_name(std::get<1>(info.param));
                         });

}  // namespace
}  // namespace quantal::kernels
