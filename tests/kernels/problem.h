#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/guarded_bytes.h"
#include "kernels/integer_linear.h"
#include "kernels/linear.h"
#include "kernels/weights.h"

namespace quantal::kernels {

constexpr FloatType kFloatTypes[] = {FloatType::kF32, FloatType::kBF16, FloatType::kF16};

/// What one rounding to a type errs by at most, relative to the number.
inline double epsilon_of(FloatType type) {
  return type == FloatType::kF32 ? 0x1p-24 : type == FloatType::kF16 ? 0x1p-11 : 0x1p-8;
}

/// Weights of odd shapes, with groups of every kind: whole lines or not, with a short last one.
inline std::vector<WeightSpec> odd_specs(QTypeId qtype) {
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
                                                          {40, 255},
                                                          {32, 512},
                                                          {129, 72},
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
};

/// What a kernel gets: pointers to memory that ends where it must not be read.
struct Operands {
  const void* x;
  const std::int8_t* codes;
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
  GuardedBytes packed, bias;
  std::vector<std::byte> x;
  std::vector<std::int8_t> codes;

  Problem(const WeightSpec& s, FloatType t, std::int64_t n)
      : spec(s),
        type(t),
        tokens(n),
        weight(s),
        layout(s),
        packed(layout.size()),
        bias(s.rows * size_of(t)),
        x(n * s.columns * size_of(t)),
        codes(n * s.columns) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (std::int64_t i = 0; i < n * s.columns; ++i) {
      store_float(x.data(), i, t, normal(random));
      codes[i] = static_cast<std::int8_t>(random());
    }
    for (std::int64_t i = 0; i < s.rows; ++i) store_float(bias.data(), i, t, normal(random));
    repack();
  }

  void repack() { pack(layout, weight.canonical(), packed.data()); }

  std::string name(const Call& call) const {
    return std::string(isa_name(call.isa)) + " " + type_name(spec.qtype) + " " +
           std::to_string(call.tokens) + "x" + std::to_string(spec.rows) + "x" +
           std::to_string(spec.columns) + " g" + std::to_string(spec.group_size) + " type " +
           std::to_string(static_cast<int>(type)) + " gap " + std::to_string(call.gap);
  }

  /// kernel(operands) with guarded copies; y of the run's tokens, without the gaps.
  std::vector<std::byte> run(const Call& call,
                             const std::function<void(const Operands&)>& kernel) const {
    const std::int64_t width = size_of(type), gap = call.gap;
    const std::int64_t x_stride = spec.columns + gap, y_stride = spec.rows + gap;
    const std::int64_t last = call.tokens > 0 ? gap : 0;  // behind the last token nothing is mapped
    GuardedBytes x_copy((call.tokens * x_stride - last) * width);
    GuardedBytes code_copy(call.tokens * x_stride - last);
    const std::int64_t y_bytes = (call.tokens * y_stride - last) * width;
    GuardedBytes y(y_bytes);
    std::memset(y.data(), 0x5A, y_bytes);
    for (std::int64_t t = 0; t < call.tokens && spec.columns > 0; ++t) {
      std::memcpy(x_copy.data() + t * x_stride * width, x.data() + t * spec.columns * width,
                  spec.columns * width);
      std::memcpy(code_copy.data() + t * x_stride, codes.data() + t * spec.columns, spec.columns);
    }
    kernel({.x = x_copy.data(),
            .codes = reinterpret_cast<const std::int8_t*>(code_copy.data()),
            .x_stride = x_stride,
            .y = y.data(),
            .y_stride = y_stride,
            .bias = call.has_bias ? bias.data() : nullptr});
    std::vector<std::byte> out;
    for (std::int64_t i = 0; i < y_bytes; ++i) {
      if (i % (y_stride * width) < spec.rows * width) {
        out.push_back(y.data()[i]);
      } else {
        EXPECT_EQ(y.data()[i], std::byte{0x5A}) << name(call) << ": wrote between tokens";
      }
    }
    return out;
  }
};

/// The weight-only linear of a call, over the packed weight.
inline std::vector<std::byte> run_linear(const Problem& problem, const Call& call) {
  return problem.run(call, [&](const Operands& operands) {
    find_linear(call.isa, problem.spec)({.layout = &problem.layout,
                                         .weight = problem.packed.data(),
                                         .tokens = call.tokens,
                                         .type = problem.type,
                                         .x = operands.x,
                                         .x_stride = operands.x_stride,
                                         .y = operands.y,
                                         .y_stride = operands.y_stride,
                                         .bias = operands.bias},
                                        call.parallel_for);
  });
}

/// The scale of activations that are codes already.
constexpr float kCodeScale = 0.03F;

/// The integer linear of a call, over the tokens as floats or as codes.
inline std::vector<std::byte> run_integer(const Problem& problem, bool has_codes,
                                          const Call& call) {
  return problem.run(call, [&](const Operands& operands) {
    IntegerLinearArgs args{.layout = &problem.layout,
                           .weight = problem.packed.data(),
                           .source = {.tokens = call.tokens, .stride = operands.x_stride},
                           .type = problem.type,
                           .y = operands.y,
                           .y_stride = operands.y_stride,
                           .bias = operands.bias};
    if (has_codes) {
      args.source.codes = operands.codes;
      args.source.scale = kCodeScale;
    } else {
      args.source.x = operands.x;
      args.source.type = problem.type;
    }
    find_integer_linear(call.isa, problem.spec)(args, call.parallel_for);
  });
}

}  // namespace quantal::kernels
