#pragma once

// Included by this folder's files and those of avx512 only, below their target pragma.
//
// canonical_rows.h by floats. `V` is a register of floats:
//   kLanes           numbers in it
//   kParts           registers that decode() makes at once of each section
//   kUnrolled        columns of a loop
//   kSums            registers for sums
//   zero(), load(), store(), broadcast(), add(), fmadd(a, b, c) = a b + c, fnmadd() = c - a b
//   convert(x, index, type)
//                    x[index, index + kLanes)
//   arrange(x, columns)
//                    brings numbers into the order of decode()
//   decode<qtype>(bytes, values[kParts][kSections])
//                    codes as floats
//   eight_parts(v)   v's sum in eight parts

#include "kernels/cpu/avx2/canonical_rows.h"

namespace quantal::kernels {
namespace {

/// Tokens as fp32 in the order in which codes are decoded, and the sums of their groups: one in
/// each lane, of every so many columns.
template <typename V>
class FloatTokens {
 public:
  using Register = typename V::Register;

  FloatTokens(const LinearArgs& args, const Operands& w, int tokens)
      : columns_(w.columns()),
        groups_(w.groups),
        x_(tokens * columns_),
        sums_(tokens * groups_ * V::kLanes) {
    for (int t = 0; t < tokens; ++t) {
      float* to = x_.data() + t * columns_;
      for (std::int64_t g = 0; g < groups_; ++g) {
        Register sum = V::zero();
        const std::int64_t end = (g + 1) * w.group_columns;
        for (std::int64_t c = g * w.group_columns; c < end; c += V::kLanes) {
          const Register numbers = V::convert(args.x, t * args.x_stride + c, args.type);
          V::store(to + c, numbers);
          sum = V::add(sum, numbers);
        }
        V::store(sums_.data() + (t * groups_ + g) * V::kLanes, sum);
      }
      V::arrange(to, columns_);
    }
  }
  const float* token(int t) const { return x_.data() + t * columns_; }
  Register sum(int t, std::int64_t group) const {
    return V::load(sums_.data() + (t * groups_ + group) * V::kLanes);
  }

 private:
  std::int64_t columns_, groups_;
  Scratch x_, sums_;
};

/// Byte rows of a step that are multiplied at once: as many as have a register for each sum.
template <typename V, QTypeId qtype, int tokens>
constexpr int kAtOnce =
    std::clamp(V::kSums / kSections<qtype> / (tokens == 3 ? 4 : tokens), 1, kByteRows<qtype>);

/// Sums of products of byte rows, sections and tokens, a column's in one of the lanes.
template <typename V, QTypeId qtype, int tokens>
using FloatSums = typename V::Register[kAtOnce<V, qtype, tokens>][kSections<qtype>][tokens];

// sums += code·x over columns [begin, end), whose number is a multiple of those decoded at once.
template <typename V, QTypeId qtype, int tokens>
void multiply(const std::uint8_t* const (&bytes)[kAtOnce<V, qtype, tokens>], std::int64_t begin,
              std::int64_t end, std::int64_t distance, const FloatTokens<V>& x,
              FloatSums<V, qtype, tokens>& out) {
  using Register = typename V::Register;
  constexpr int kRows = kAtOnce<V, qtype, tokens>;
  constexpr std::int64_t kColumns = V::kParts * V::kLanes;
  static_assert(kPrefetchBytes % V::kUnrolled == 0 && V::kUnrolled % kColumns == 0);
  Register sums[kRows][kSections<qtype>][tokens];
  const auto copy = [](const auto& from, auto& to) __attribute__((always_inline)) {
    QUANTAL_UNROLL for (int r = 0; r < kRows; ++r) {
      QUANTAL_UNROLL for (int s = 0; s < kSections<qtype>; ++s) {
        QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) to[r][s][t] = from[r][s][t];
      }
    }
  };
  const auto step = [&](std::int64_t column) __attribute__((always_inline)) {
    QUANTAL_UNROLL for (int r = 0; r < kRows; ++r) {
      Register values[V::kParts][kSections<qtype>];
      V::template decode<qtype>(bytes[r] + column, values);
      QUANTAL_UNROLL for (int p = 0; p < V::kParts; ++p) {
        QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
          const Register numbers = V::load(x.token(t) + column + p * V::kLanes);
          QUANTAL_UNROLL for (int s = 0; s < kSections<qtype>; ++s) {
            sums[r][s][t] = V::fmadd(values[p][s], numbers, sums[r][s][t]);
          }
        }
      }
    }
  };
  copy(out, sums);
  std::int64_t column = begin;
  for (; column + V::kUnrolled <= end; column += V::kUnrolled) {
    QUANTAL_UNROLL for (int r = 0; r < kRows; ++r) prefetch(bytes[r] + column + distance);
    QUANTAL_UNROLL for (int i = 0; i < V::kUnrolled; i += kColumns) step(column + i);
  }
  for (; column < end; column += kColumns) step(column);
  copy(sums, out);
}

// The outputs of a step, before the bias, a part in each lane: totals[token][output].
template <typename V, QTypeId qtype, int tokens>
void add_rows(const Operands& w, const Step<qtype>& step, const StepScales<qtype>& scales,
              const FloatTokens<V>& x, int first,
              typename V::Register (&totals)[tokens][kOutputs]) {
  constexpr int kRows = kAtOnce<V, qtype, tokens>;
  const std::uint8_t* bytes[kRows];
  for (int r = 0; r < kRows; ++r) bytes[r] = step.bytes(w, first + r);
  for (std::int64_t g = 0; g < w.groups; ++g) {
    FloatSums<V, qtype, tokens> sums;
    QUANTAL_UNROLL for (int r = 0; r < kRows; ++r) {
      QUANTAL_UNROLL for (int s = 0; s < kSections<qtype>; ++s) {
        QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) sums[r][s][t] = V::zero();
      }
    }
    const std::int64_t end = (g + 1) * w.group_columns;
    for (std::int64_t c = g * w.group_columns; c < end; c += kPrefetchBytes) {
      multiply<V, qtype, tokens>(bytes, c, std::min(end, c + kPrefetchBytes),
                                 prefetch_distance<qtype>(w, c), x, sums);
    }
    for (int r = 0; r < kRows; ++r) {
      for (int s = 0; s < kSections<qtype>; ++s) {
        const int row = step.clamped(first + r);
        const std::int64_t at = (s * kByteRows<qtype> + row) * w.groups + g;
        const auto scale = V::broadcast(scales.scales() + at);
        for (int t = 0; t < tokens; ++t) {
          auto& total = totals[t][s * kByteRows<qtype> + first + r];
          total = V::fmadd(sums[r][s][t], scale, total);
          if constexpr (kSections<qtype> > 1) {
            total = V::fnmadd(V::broadcast(scales.shifts() + at), x.sum(t, g), total);
          }
        }
      }
    }
  }
}

template <typename V, QTypeId qtype, int tokens>
void run_floats(const LinearArgs& args, const Operands& w, const ParallelFor& parallel_for) {
  const FloatTokens<V> x(args, w, tokens);
  parallel_for(steps_of<qtype>(w), [&](std::int64_t begin, std::int64_t end) {
    const StepScales<qtype> scales(w.groups);
    for (std::int64_t i = begin; i < end; ++i) {
      const Step<qtype> step(w, i);
      scales.load(w, step);
      typename V::Register totals[tokens][kOutputs];
      for (auto& token : totals) std::fill_n(token, kOutputs, V::zero());
      for (int first = 0; first < kByteRows<qtype>; first += kAtOnce<V, qtype, tokens>) {
        add_rows<V, qtype, tokens>(w, step, scales, x, first, totals);
      }
      for (int t = 0; t < tokens; ++t) {
        __m256 parts[kOutputs];
        for (int o = 0; o < kOutputs; ++o) parts[o] = V::eight_parts(totals[t][o]);
        step.store(args, w, t, sums_of(parts), 1);
      }
    }
  });
}

/// Precondition: groups of whole steps of V.
template <typename V, QTypeId qtype>
void run_floats(const LinearArgs& args, const Operands& w, const ParallelFor& parallel_for) {
  switch (args.tokens) {
    case 1:
      return run_floats<V, qtype, 1>(args, w, parallel_for);
    case 2:
      return run_floats<V, qtype, 2>(args, w, parallel_for);
    case 3:
      return run_floats<V, qtype, 3>(args, w, parallel_for);
    default:
      return run_floats<V, qtype, 4>(args, w, parallel_for);
  }
}

}  // namespace
}  // namespace quantal::kernels
