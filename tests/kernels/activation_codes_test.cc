#include "kernels/activation_codes.h"

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/guarded_bytes.h"

namespace quantal::kernels {
namespace {

class ActivationCodes : public testing::TestWithParam<std::tuple<Isa, FloatType>> {
 protected:
  Isa isa() const { return std::get<0>(GetParam()); }
  FloatType type() const { return std::get<1>(GetParam()); }

  void expect_nearest(std::int64_t count, Edge edge) const {
    constexpr float kScale = 0.03F;
    const std::int64_t size = count * size_of(type());
    const GuardedBytes x(size, edge), y(size, edge), bytes(count, edge);
    auto* codes = reinterpret_cast<std::int8_t*>(bytes.data());
    std::mt19937 random(1);
    std::normal_distribution<float> normal(0, 2);
    for (std::int64_t i = 0; i < count; ++i) {
      // Halves between two codes, too; and numbers that saturate.
      const float value =
          i % 3 == 0 ? (static_cast<float>(i % 200) + 0.5F) * kScale : normal(random);
      store_float(x.data(), i, type(), value);
    }
    ASSERT_TRUE(quantize_codes(isa(), x.data(), type(), count, kScale, codes));
    dequantize_codes(isa(), codes, count, kScale, type(), y.data());
    for (std::int64_t i = 0; i < count; ++i) {
      const float value = load_float(x.data(), i, type());
      const float wanted = std::min(127.0F, std::max(-127.0F, std::nearbyint(value / kScale)));
      ASSERT_EQ(codes[i], wanted) << value;
      float back = 0;
      store_float(&back, 0, type(), wanted * kScale);
      ASSERT_EQ(load_float(y.data(), i, type()), load_float(&back, 0, type()));
    }
  }
};
INSTANTIATE_TEST_SUITE_P(EveryIsa, ActivationCodes,
                         testing::Combine(testing::ValuesIn(supported_isas()),
                                          testing::Values(FloatType::kF32, FloatType::kBF16,
                                                          FloatType::kF16)),
                         [](const auto& info) {
                           return std::string(isa_name(std::get<0>(info.param))) + "_" +
                                  std::to_string(static_cast<int>(std::get<1>(info.param)));
                         });

TEST_P(ActivationCodes, are_the_nearest_and_come_back) {
  for (const std::int64_t count :
       {0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 129, 255, 1000, 1023, 40000}) {
    for (const Edge edge : kEdges) expect_nearest(count, edge);
  }
}

TEST_P(ActivationCodes, saturate_infinities_and_refuse_nan) {
  for (const std::int64_t count : {5, 16, 20, 70000}) {
    for (const std::int64_t place : {std::int64_t{0}, count / 2, count - 1}) {
      std::vector<float> x(count, 0.0F);
      std::vector<std::int8_t> codes(count);
      store_float(x.data(), place, type(), -INFINITY);
      ASSERT_TRUE(quantize_codes(isa(), x.data(), type(), count, 1, codes.data()));
      EXPECT_EQ(codes[place], -127);
      store_float(x.data(), place, type(), NAN);
      EXPECT_FALSE(quantize_codes(isa(), x.data(), type(), count, 1, codes.data()));
    }
  }
}

}  // namespace
}  // namespace quantal::kernels
