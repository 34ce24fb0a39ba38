#include "kernels/finite.h"

#include <cmath>
#include <limits>

#include <gtest/gtest.h>

#include "kernels/guarded_bytes.h"

namespace quantal::kernels {
namespace {

using Case = std::tuple<Isa, FloatType>;
class NonFinite : public testing::TestWithParam<Case> {
 protected:
  std::int64_t find(const GuardedBytes& x, std::int64_t count) const {
    return find_non_finite(std::get<0>(GetParam()), x.data(), type(), count);
  }
  FloatType type() const { return std::get<1>(GetParam()); }

  void expect_found(std::int64_t count, Edge edge) const {
    const GuardedBytes x(count * size_of(type()), edge);
    const float largest = type() == FloatType::kF16    ? 65504
                          : type() == FloatType::kBF16 ? 0x1.FEp127F
                                                       : std::numeric_limits<float>::max();
    for (std::int64_t i = 0; i < count; ++i) {
      store_float(x.data(), i, type(), i % 3 == 0 ? largest : i % 3 == 1 ? -largest : -0.0F);
    }
    ASSERT_EQ(find(x, count), -1);
    store_float(x.data(), count - 1, type(), INFINITY);
    for (const float bad : {INFINITY, -INFINITY, NAN, -NAN}) {
      for (const std::int64_t place : {std::int64_t{0}, count / 3, count / 2, count - 1}) {
        const float before = load_float(x.data(), place, type());
        store_float(x.data(), place, type(), bad);
        ASSERT_EQ(find(x, count), place) << "of " << count;
        store_float(x.data(), place, type(), before);
      }
    }
  }
};
INSTANTIATE_TEST_SUITE_P(EveryIsa, NonFinite,
                         testing::Combine(testing::ValuesIn(supported_isas()),
                                          testing::Values(FloatType::kF32, FloatType::kBF16,
                                                          FloatType::kF16)),
                         [](const auto& info) {
                           return std::string(isa_name(std::get<0>(info.param))) + "_" +
                                  std::to_string(static_cast<int>(std::get<1>(info.param)));
                         });

TEST_P(NonFinite, is_found_where_it_is_first) {
  for (const std::int64_t count : {1, 2, 15, 17, 63, 64, 65, 129, 1000, 70000, 200000}) {
    for (const Edge edge : kEdges) expect_found(count, edge);
  }
  EXPECT_EQ(find(GuardedBytes(0), 0), -1);
}

}  // namespace
}  // namespace quantal::kernels
