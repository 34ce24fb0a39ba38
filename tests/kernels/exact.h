#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "kernels/problem.h"

namespace quantal::kernels {

/// Whether a linear uses the processor's product of bf16 numbers: it takes subnormal activations
/// and sums for zeros (docs/numerics.md).
inline bool multiplies_bf16(Isa isa, FloatType type) {
  return type == FloatType::kBF16 && (isa == Isa::kAvx512Bf16 || isa == Isa::kNeonBf16);
}

/// Whether a linear rounds the values of its weight to bf16 (docs/numerics.md).
inline bool rounds_weight(const Call& call, const WeightSpec& spec, FloatType type) {
  return call.isa == Isa::kAmx && type == FloatType::kBF16 && call.tokens > 32 &&
         PackedLayout(spec).groups() > 1;
}

/// The results of a problem in fp64, and by how much fp32 may miss them.
class Exact {
 public:
  explicit Exact(const Problem& problem) : problem_(problem) {
    const std::int64_t rows = problem.spec.rows, columns = problem.spec.columns;
    std::vector<double> weights(rows * columns), rounded(rows * columns), sizes(rows * columns);
    std::vector<double> x(columns);
    row_sizes_.resize(rows), row_scales_.resize(rows);
    for (std::int64_t i = 0; i < rows * columns; ++i) {
      const auto parts = problem.weight.parts(i / columns, i % columns);
      weights[i] = parts.value();
      rounded[i] = rounded_value(parts);
      sizes[i] = parts.size();
      row_sizes_[i / columns] += parts.size();
      row_scales_[i / columns] = std::max(row_scales_[i / columns], parts.scale);
    }
    for (std::int64_t t = 0; t < problem.tokens; ++t) {
      x_sizes_.push_back(0), largest_tiny_.push_back(0);
      for (std::int64_t k = 0; k < columns; ++k) {
        x[k] = load_float(problem.x.data(), t * columns + k, problem.type);
        const double size = std::abs(x[k]);
        x_sizes_.back() += size;
        if (size < kSmallest) largest_tiny_.back() = std::max(largest_tiny_.back(), size);
      }
      for (std::int64_t r = 0; r < rows; ++r) {
        double sum = 0, rounded_sum = 0, size = 0;
        for (std::int64_t k = 0; k < columns; ++k) {
          sum += x[k] * weights[r * columns + k];
          rounded_sum += x[k] * rounded[r * columns + k];
          size += std::abs(x[k]) * sizes[r * columns + k];
        }
        sums_.push_back(sum);
        rounded_sums_.push_back(rounded_sum);
        sizes_.push_back(size);
      }
    }
  }

  void check(const Call& call, const std::vector<std::byte>& y) const {
    const FloatType type = problem_.type;
    const bool rounds = rounds_weight(call, problem_.spec, type);
    const std::vector<double>& sums = rounds ? rounded_sums_ : sums_;
    for (std::int64_t i = 0; i < call.tokens * problem_.spec.rows; ++i) {
      const double wanted = sums[i] + bias_of(call, i), got = load_float(y.data(), i, type);
      if (!std::isfinite(wanted)) {
        ASSERT_FALSE(std::isfinite(got)) << problem_.name(call) << " at " << i;
        continue;
      }
      const double bound = bound_of(call, i) + rounding_of(type, wanted);
      const bool overflows = type == FloatType::kF16 && std::abs(wanted) + bound >= 65520;
      if (overflows && std::isinf(got)) continue;
      ASSERT_NEAR(got, wanted, bound) << problem_.name(call) << " at " << i;
    }
  }

  /// For a problem of whole numbers: no sum rounds, and the result once.
  void check_whole(const Call& call, const std::vector<std::byte>& y) const {
    for (std::int64_t i = 0; i < call.tokens * problem_.spec.rows; ++i) {
      float wanted = 0;
      store_float(&wanted, 0, problem_.type, static_cast<float>(sums_[i] + bias_of(call, i)));
      ASSERT_EQ(load_float(y.data(), i, problem_.type), load_float(&wanted, 0, problem_.type))
          << problem_.name(call) << " at " << i;
    }
  }

 private:
  double bias_of(const Call& call, std::int64_t i) const {
    const std::int64_t row = i % problem_.spec.rows;
    return call.has_bias ? load_float(problem_.bias.data(), row, problem_.type) : 0;
  }

  // In bf16, as dequantize_range() gives it.
  template <typename Parts>
  static double rounded_value(const Parts& parts) {
    const float value = std::fma(static_cast<float>(parts.scale), static_cast<float>(parts.code),
                                 -static_cast<float>(parts.shift));
    std::uint16_t half = 0;
    store_float(&half, 0, FloatType::kBF16, value);
    return load_float(&half, 0, FloatType::kBF16);
  }

  // γ · Σ|x|·(|scale·code| + |shift|): fp32 sums of n terms err by at most n + 4 roundings: the
  // products, scale, shift and bias are the four. What is subnormal errs by half of the smallest
  // number instead: a product before it is scaled, a weight before it is multiplied.
  double bound_of(const Call& call, std::int64_t i) const {
    const std::int64_t token = i / problem_.spec.rows, row = i % problem_.spec.rows;
    const auto roundings = static_cast<double>(problem_.spec.columns + 4);
    const double size = sizes_[i] + std::abs(bias_of(call, i));
    const double subnormal = roundings * (1 + row_scales_[row]) + x_sizes_[token];
    return roundings * 0x1p-24 * size + subnormal * 0x1p-150 + flushed(call, token, row);
  }

  // What goes lost in products of bf16 numbers.
  double flushed(const Call& call, std::int64_t token, std::int64_t row) const {
    if (!multiplies_bf16(call.isa, problem_.type)) return 0;
    const auto sums = static_cast<double>(problem_.spec.columns);
    return largest_tiny_[token] * row_sizes_[row] + kSmallest * sums * row_scales_[row];
  }

  static constexpr double kSmallest = std::numeric_limits<float>::min();

  const Problem& problem_;
  std::vector<double> sums_, rounded_sums_, sizes_;
  std::vector<double> x_sizes_;       ///< Σ|x| of each token
  std::vector<double> largest_tiny_;  ///< the largest subnormal |x| of each token
  std::vector<double> row_sizes_;     ///< of each row of the weight
  std::vector<double> row_scales_;    ///< the largest scale of each
};

}  // namespace quantal::kernels
