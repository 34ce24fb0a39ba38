#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/canonical_linear.h"
#include "kernels/guarded_weight.h"
#include "kernels/integer_linear.h"
#include "kernels/linear.h"

namespace quantal::kernels {

constexpr FloatType kFloatTypes[] = {FloatType::kF32, FloatType::kBF16, FloatType::kF16};

/// What one rounding to a type errs by at most, relative to the number.
inline double epsilon_of(FloatType type) {
  return type == FloatType::kF32 ? 0x1p-24 : type == FloatType::kF16 ? 0x1p-11 : 0x1p-8;
}

/// What one rounding of a number to a type errs by at most, subnormal ones included.
inline double rounding_of(FloatType type, double number) {
  const double smallest = type == FloatType::kF32   ? 0x1p-149
                          : type == FloatType::kF16 ? 0x1p-24
                                                    : 0x1p-133;
  return std::max(std::abs(number) * epsilon_of(type), smallest / 2);
}

/// Weights of odd shapes, with groups of every kind: whole lines or not, with a short last one.
inline std::vector<WeightSpec> odd_specs(QTypeId qtype) {
  std::vector<WeightSpec> all;
  for (const auto& [rows, columns] : std::vector<std::pair<std::int64_t, std::int64_t>>{
           {1, 1},    {2, 3},    {3, 7},   {5, 15},   {15, 16},  {16, 17}, {17, 31},
           {31, 33},  {33, 63},  {63, 65}, {65, 127}, {16, 128}, {7, 129}, {40, 255},
           {32, 512}, {129, 72}, {127, 2}, {255, 5},  {1023, 2}, {9, 1023}}) {
    all.push_back({qtype, rows, columns, 0, FloatType::kF32});
    if (!is_affine(qtype)) continue;
    for (const std::int64_t group : {8, 32, 64, 96, 128}) {
      all.push_back(
          {qtype, rows, columns, group, group == 64 ? FloatType::kF16 : FloatType::kBF16});
    }
  }
  return all;
}

/// Small enough for a test to run them on several numbers of threads.
inline std::vector<WeightSpec> specs_for_threads(QTypeId qtype) {
  std::vector<WeightSpec> all = {{qtype, 200, 100, 0, FloatType::kF32}};
  if (is_affine(qtype)) {
    all.push_back({qtype, 81, 170, 32, FloatType::kBF16});
  }
  return all;
}

/// Every part on a thread of its own, `parts` or fewer.
inline ParallelFor in_parts(std::int64_t parts) {
  return [=](std::int64_t count, const std::function<void(std::int64_t, std::int64_t)>& body) {
    std::vector<std::thread> threads;
    for (std::int64_t i = 0; i < parts; ++i) {
      const std::int64_t begin = count * i / parts, end = count * (i + 1) / parts;
      if (begin < end) threads.emplace_back([&body, begin, end] { body(begin, end); });
    }
    for (auto& thread : threads) thread.join();
  };
}

/// How a problem's first `tokens` tokens are run.
struct Call {
  Isa isa = Isa::kPortable;
  std::int64_t tokens = 0;
  bool has_bias = true;
  std::int64_t gap = 0;  ///< elements between the end of a token and the next one's beginning
  ParallelFor parallel_for = serial_for;
  /// Where operands lie; without it, at one edge in one run and at the other in the next.
  std::optional<Edge> edge = std::nullopt;
  std::int64_t distance = 0;  ///< elements from there: of y three times as many, of the bias five
};

/// What a kernel gets: pointers to memory that begins or ends where it must not be read.
struct Operands {
  Edge edge;
  const std::byte* weight;
  const void* x;  ///< floats, or codes
  std::int64_t x_stride;
  void* y;
  std::int64_t y_stride;
  const void* bias;
};

/// A weight and random tokens, as floats and as codes, for a linear.
struct Problem {
  WeightSpec spec;
  FloatType type;
  std::int64_t tokens;
  RandomWeight weight;
  PackedLayout layout;
  GuardedBytes packed_last, packed_first;
  std::vector<std::byte> bias, x;
  std::vector<std::int8_t> codes;
  mutable std::int64_t runs;

  Problem(const WeightSpec& s, FloatType t, std::int64_t n)
      : spec(s),
        type(t),
        tokens(n),
        weight(s),
        layout(s),
        packed_last(layout.size(), Edge::kLast),
        packed_first(layout.size(), Edge::kFirst),
        bias(s.rows * size_of(t)),
        x(n * s.columns * size_of(t)),
        codes(n * s.columns),
        runs(s.rows + s.columns + static_cast<int>(t)) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (std::int64_t i = 0; i < n * s.columns; ++i) {
      store_float(x.data(), i, t, normal(random));
      codes[i] = static_cast<std::int8_t>(random());
    }
    for (std::int64_t i = 0; i < s.rows; ++i) store_float(bias.data(), i, t, normal(random));
    repack();
  }

  void repack() const {
    pack(layout, weight.canonical(), packed_last.data());
    std::copy_n(packed_last.data(), layout.size(), packed_first.data());
  }

  /// Sums in fp32 are exact then, in any order: every kernel gives the same bits.
  void make_whole() {
    std::mt19937 random(2);
    const auto number = [&] { return static_cast<float>(random() % 7) - 3; };
    for (std::int64_t i = 0; i < tokens * spec.columns; ++i) {
      store_float(x.data(), i, type, number());
    }
    for (std::int64_t i = 0; i < spec.rows; ++i) store_float(bias.data(), i, type, number());
    weight.make_whole();
    repack();
  }

  std::string name(const Call& call) const {
    return std::string(isa_name(call.isa)) + " " + type_name(spec.qtype) + " " +
           std::to_string(call.tokens) + "x" + std::to_string(spec.rows) + "x" +
           std::to_string(spec.columns) + " g" + std::to_string(spec.group_size) + " type " +
           std::to_string(static_cast<int>(type)) + " gap " + std::to_string(call.gap) +
           " distance " + std::to_string(call.distance);
  }

  /// kernel(operands) with guarded copies; y of the run's tokens, without the gaps.
  std::vector<std::byte> run(const Call& call, bool has_codes,
                             const std::function<void(const Operands&)>& kernel) const {
    const std::int64_t width = size_of(type), gap = call.gap, far = call.distance;
    const std::int64_t x_stride = spec.columns + gap, y_stride = spec.rows + gap;
    const std::int64_t last = call.tokens > 0 ? gap : 0;  // behind the last token nothing is mapped
    const Edge edge = call.edge.value_or(++runs % 2 == 0 ? Edge::kLast : Edge::kFirst);
    const std::int64_t x_width = has_codes ? 1 : width, row = spec.columns * x_width;
    const GuardedBytes x_copy((call.tokens * x_stride - last) * x_width, edge, far * x_width);
    const GuardedBytes bias_copy(spec.rows * width, edge, 5 * far * width);
    const GuardedBytes y((call.tokens * y_stride - last) * width, edge, 3 * far * width);
    std::memset(x_copy.data(), kNan, x_copy.size());
    std::memset(y.data(), kUnwritten, y.size());
    const void* from = has_codes ? static_cast<const void*>(codes.data()) : x.data();
    for (std::int64_t t = 0; t < call.tokens && row > 0; ++t) {
      std::memcpy(x_copy.data() + t * x_stride * x_width,
                  static_cast<const std::byte*>(from) + t * row, row);
    }
    std::ranges::copy(bias, bias_copy.data());
    kernel({.edge = edge,
            .weight = edge == Edge::kLast ? packed_last.data() : packed_first.data(),
            .x = x_copy.data(),
            .x_stride = x_stride,
            .y = y.data(),
            .y_stride = y_stride,
            .bias = call.has_bias ? bias_copy.data() : nullptr});
    return without_gaps(call, y);
  }

 private:
  static constexpr int kNan = 0xFF;  ///< of every type, in each of its bytes
  static constexpr int kUnwritten = 0x5A;

  std::vector<std::byte> without_gaps(const Call& call, const GuardedBytes& y) const {
    const std::size_t row = spec.rows * size_of(type), gap = call.gap * size_of(type);
    std::vector<std::byte> out;
    for (auto rest = y.span(); !rest.empty();) {
      out.insert(out.end(), rest.begin(), rest.begin() + row);
      rest = rest.subspan(row);
      const auto between = rest.first(std::min(gap, rest.size()));
      EXPECT_TRUE(std::ranges::all_of(between,
                                      [](std::byte byte) { return byte == std::byte{kUnwritten}; }))
          << name(call) << ": wrote between tokens";
      rest = rest.subspan(between.size());
    }
    return out;
  }
};

/// The arguments of a linear, but for the weight.
inline LinearArgs float_args(const Problem& problem, const Call& call, const Operands& operands) {
  return {.layout = &problem.layout,
          .tokens = call.tokens,
          .type = problem.type,
          .x = operands.x,
          .x_stride = operands.x_stride,
          .y = operands.y,
          .y_stride = operands.y_stride,
          .bias = operands.bias};
}

/// The weight-only linear of a call, over the packed weight.
inline std::vector<std::byte> run_linear(const Problem& problem, const Call& call) {
  return problem.run(call, false, [&](const Operands& operands) {
    LinearArgs args = float_args(problem, call, operands);
    args.weight = operands.weight;
    find_linear(call.isa, problem.spec)(args, call.parallel_for);
  });
}

/// The same over the weight in canonical form.
inline std::vector<std::byte> run_canonical(const Problem& problem, const Call& call) {
  return problem.run(call, false, [&](const Operands& operands) {
    const GuardedCanonical weight(problem.weight, operands.edge, call.distance);
    linear_from_canonical(call.isa, float_args(problem, call, operands), weight.get(),
                          call.parallel_for);
  });
}

/// The scale of activations that are codes already.
constexpr float kCodeScale = 0.03F;

/// The arguments of an integer linear over the tokens as floats or as codes, but for the weight.
inline IntegerLinearArgs integer_args(const Problem& problem, bool has_codes, const Call& call,
                                      const Operands& operands) {
  IntegerLinearArgs args{.layout = &problem.layout,
                         .source = {.tokens = call.tokens, .stride = operands.x_stride},
                         .type = problem.type,
                         .y = operands.y,
                         .y_stride = operands.y_stride,
                         .bias = operands.bias};
  if (has_codes) {
    args.source.codes = static_cast<const std::int8_t*>(operands.x);
    args.source.scale = kCodeScale;
  } else {
    args.source.x = operands.x;
    args.source.type = problem.type;
  }
  return args;
}

/// The integer linear of a call, over the packed weight.
inline std::vector<std::byte> run_integer(const Problem& problem, bool has_codes,
                                          const Call& call) {
  return problem.run(call, has_codes, [&](const Operands& operands) {
    IntegerLinearArgs args = integer_args(problem, has_codes, call, operands);
    args.weight = operands.weight;
    find_integer_linear(call.isa, problem.spec)(args, call.parallel_for);
  });
}

/// The same over the weight in canonical form.
inline std::vector<std::byte> run_integer_canonical(const Problem& problem, bool has_codes,
                                                    const Call& call) {
  return problem.run(call, has_codes, [&](const Operands& operands) {
    const GuardedCanonical weight(problem.weight, operands.edge, call.distance);
    integer_linear_from_canonical(call.isa, integer_args(problem, has_codes, call, operands),
                                  weight.get(), call.parallel_for);
  });
}

}  // namespace quantal::kernels
