#include "kernels/gather.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/guarded_weight.h"

namespace quantal::kernels {
namespace {

class Gathered : public testing::TestWithParam<std::tuple<Isa, QTypeId, FloatType>> {
 protected:
  Isa isa() const { return std::get<0>(GetParam()); }
  QTypeId qtype() const { return std::get<1>(GetParam()); }
  FloatType type() const { return std::get<2>(GetParam()); }

  // The canonical form lies at an edge of memory, and so does the result.
  void compare(const RandomWeight& weight, const std::vector<std::int64_t>& indices) const {
    const WeightSpec& spec = weight.spec;
    SCOPED_TRACE(testing::Message()
                 << spec.rows << " x " << spec.columns << " by " << spec.group_size);
    for (const Edge edge : kEdges) {
      const auto count = static_cast<std::int64_t>(indices.size());
      const GuardedBytes y(count * spec.columns * size_of(type()), edge);
      const GuardedCanonical canonical(weight, edge);
      gather_rows(isa(), spec, canonical.get(), indices.data(), count, type(), y.data());
      expect_rows(weight, indices, y.data());
    }
  }

  // All rows, by parts that must not write to each other's.
  void compare_all(const RandomWeight& weight) const {
    const WeightSpec& spec = weight.spec;
    std::vector<std::int64_t> rows(spec.rows);
    std::iota(rows.begin(), rows.end(), 0);
    for (const Edge edge : kEdges) {
      const GuardedBytes y(spec.rows * spec.columns * size_of(type()), edge);
      const GuardedCanonical canonical(weight, edge);
      const auto backwards = [](std::int64_t count, const auto& body) {
        for (std::int64_t i = count; i > 0; i -= 2) body(std::max<std::int64_t>(i - 2, 0), i);
      };
      dequantize_canonical(isa(), spec, canonical.get(), 0, spec.rows, type(), y.data(), backwards);
      expect_rows(weight, rows, y.data());
    }
    // The last two thirds alone.
    const std::int64_t first = spec.rows / 3;
    const std::vector<std::int64_t> last(rows.begin() + first, rows.end());
    for (const Edge edge : kEdges) {
      const GuardedBytes y((spec.rows - first) * spec.columns * size_of(type()), edge);
      const GuardedCanonical canonical(weight, edge);
      dequantize_canonical(isa(), spec, canonical.get(), first, spec.rows - first, type(),
                           y.data());
      expect_rows(weight, last, y.data());
    }
  }

 private:
  void expect_rows(const RandomWeight& weight, const std::vector<std::int64_t>& indices,
                   const std::byte* y) const {
    const WeightSpec& spec = weight.spec;
    for (std::int64_t i = 0; i < std::ssize(indices); ++i) {
      for (std::int64_t c = 0; c < spec.columns; ++c) {
        // Doubles hold each operation exactly: it is rounded to fp32 once. fp16 saturates.
        float wanted = value_of(weight, indices[i], c);
        if (type() == FloatType::kF16) wanted = std::clamp(wanted, -65504.0F, 65504.0F);
        float stored = 0;
        store_float(&stored, 0, type(), wanted);
        ASSERT_EQ(load_float(y, i * spec.columns + c, type()), load_float(&stored, 0, type()))
            << indices[i] << ", " << c;
      }
    }
  }

  static float value_of(const RandomWeight& weight, std::int64_t row, std::int64_t column) {
    const std::int64_t group = weight.spec.group_size > 0 ? column / weight.spec.group_size : 0;
    const std::int64_t index = row * CanonicalCodes(weight.spec).groups() + group;
    if (!weight.is_affine()) return static_cast<float>(weight.value(row, column));
    const double shift = load_float(weight.shift.data(), index, weight.spec.scale_type);
    const auto product = static_cast<float>(weight.value(row, column) + shift);
    return product - static_cast<float>(shift);
  }
};

INSTANTIATE_TEST_SUITE_P(
    EveryIsa, Gathered,
    testing::Combine(testing::ValuesIn(supported_isas()), testing::ValuesIn(kAllTypes),
                     testing::Values(FloatType::kF32, FloatType::kBF16, FloatType::kF16)),
    [](const auto& info) {
      return std::string(isa_name(std::get<0>(info.param))) + "_" +
             type_name(std::get<1>(info.param)) + "_" +
             std::to_string(static_cast<int>(std::get<2>(info.param)));
    });

TEST_P(Gathered, rows_are_the_weights_value) {
  for (const FloatType scales : {FloatType::kF32, FloatType::kBF16, FloatType::kF16}) {
    for (const std::int64_t columns : {1, 7, 15, 16, 17, 31, 33, 129, 255}) {
      const RandomWeight whole({qtype(), 5, columns, 0, scales});
      compare(whole, {4, 0, 0, 3, 1, 2, 4});
      compare(whole, {});
      compare_all(whole);
      if (!whole.is_affine()) continue;
      for (const std::int64_t group : {1, 16, 32, 128}) {
        const RandomWeight grouped({qtype(), 5, columns, group, scales});
        compare(grouped, {4, 0, 0, 3, 1, 2, 4});
        compare_all(grouped);
      }
    }
  }
}

}  // namespace
}  // namespace quantal::kernels
