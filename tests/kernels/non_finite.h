#pragma once

#include <cmath>
#include <functional>
#include <vector>

#include "kernels/problem.h"

namespace quantal::kernels {

/// One of the linears of problem.h.
using RunLinear = std::function<std::vector<std::byte>(const Problem&, const Call&)>;

/// Infinities and NaN in some tokens, two or more, leave the bits of the others as they are.
inline void expect_infinities_in_their_token(const WeightSpec& spec, FloatType type,
                                             const Call& call, const RunLinear& run) {
  const std::int64_t tokens = call.tokens, rows = spec.rows, columns = spec.columns;
  Problem problem(spec, type, tokens);
  const auto clean = run(problem, call);
  const auto spoil = [&](std::int64_t token, std::int64_t column, float value) {
    store_float(problem.x.data(), token * columns + column, type, value);
  };
  spoil(0, 5, INFINITY);
  spoil(1, columns - 1, NAN);
  const std::int64_t third = tokens > 3 ? tokens - 1 : 0;
  spoil(third, 0, -INFINITY);
  const auto y = run(problem, call);
  for (std::int64_t i = 0; i < tokens * rows; ++i) {
    const float got = load_float(y.data(), i, type);
    const std::int64_t token = i / rows;
    if (token == 1) {
      EXPECT_TRUE(std::isnan(got)) << problem.name(call) << " at " << i;
    } else if (token == 0 || token == third) {
      EXPECT_FALSE(std::isfinite(got)) << problem.name(call) << " at " << i;
    } else {
      EXPECT_EQ(got, load_float(clean.data(), i, type)) << problem.name(call) << " at " << i;
    }
  }
}

/// A code, a scale or a shift that is NaN, and an infinite code, leave the bits of other rows as
/// they are. Precondition: 20 rows of 7 columns or more.
inline void expect_nan_in_its_row(const WeightSpec& spec, FloatType type, const Call& call,
                                  const RunLinear& run) {
  Problem problem(spec, type, call.tokens);
  const auto clean = run(problem, call);
  const std::int64_t groups = problem.layout.groups();
  const bool is_float8 = !problem.layout.is_affine() && spec.qtype != QTypeId::kInt8;
  const bool has_infinity = spec.qtype == QTypeId::kFloat8E5M2;
  RandomWeight& weight = problem.weight;
  if (is_float8) {
    const std::uint8_t nan = spec.qtype == QTypeId::kFloat8E4M3FNUZ ? 0x80 : 0x7F;
    weight.data[3 * spec.columns + 6] = nan;
  }
  if (has_infinity) weight.data[17 * spec.columns] = 0xFC;
  store_float(weight.scale.data(), 6 * groups - 1, spec.scale_type, NAN);
  if (weight.is_affine()) store_float(weight.shift.data(), 19 * groups, spec.scale_type, NAN);
  problem.repack();
  const auto y = run(problem, call);
  for (std::int64_t i = 0; i < call.tokens * spec.rows; ++i) {
    const float got = load_float(y.data(), i, type);
    const std::int64_t row = i % spec.rows;
    if (row == 5 || (row == 3 && is_float8) || (row == 19 && weight.is_affine())) {
      EXPECT_TRUE(std::isnan(got)) << problem.name(call) << " at " << i;
    } else if (row == 17 && has_infinity) {
      EXPECT_FALSE(std::isfinite(got)) << problem.name(call) << " at " << i;
    } else {
      EXPECT_EQ(got, load_float(clean.data(), i, type)) << problem.name(call) << " at " << i;
    }
  }
}

}  // namespace quantal::kernels
