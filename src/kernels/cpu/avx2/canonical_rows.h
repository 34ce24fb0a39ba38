#pragma once

// Included by this folder's files and those of avx512 only, below their target pragma.
//
// A few tokens by a weight in canonical form: rows are read where they lie, since packing them
// first would take longer than the products. Bytes of narrow codes hold 2 or 4 rows, which are as
// far apart as the weight is high. A step takes as many byte rows as have 8 rows of the result, so
// that their sums are independent, share what is read of a token and end in one register.

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "kernels/canonical_linear.h"
#include "kernels/cpu/avx2/rows.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kPrefetchBytes = 1024;
constexpr int kOutputs = 8;

template <QTypeId qtype>
constexpr int kSections = qtype == QTypeId::kInt2   ? 4
                          : qtype == QTypeId::kInt4 ? 2
                                                    : 1;
/// Byte rows of a step. Output s · kByteRows + r is section s of its byte row r.
template <QTypeId qtype>
constexpr int kByteRows = kOutputs / kSections<qtype>;

/// Where what computes finds its operands: byte row r holds rows r + section · byte_rows.
struct Operands {
  const PackedLayout& layout;
  const CanonicalWeight& weight;
  std::int64_t byte_rows;
  std::int64_t groups, group_columns;

  std::int64_t columns() const { return layout.spec().columns; }
  const std::uint8_t* bytes(std::int64_t row) const { return weight.data + row * columns(); }
};

/// The byte rows of a step. Where the weight ends within it, its last row is there several times.
template <QTypeId qtype>
class Step {
 public:
  Step(const Operands& w, std::int64_t step)
      : first_(step * kByteRows<qtype>),
        rows_(std::min<std::int64_t>(kByteRows<qtype>, w.byte_rows - first_)) {}

  /// How many there are.
  std::int64_t rows() const { return rows_; }
  int clamped(int r) const { return static_cast<int>(std::min<std::int64_t>(r, rows_ - 1)); }
  const std::uint8_t* bytes(const Operands& w, int r) const { return w.bytes(first_ + clamped(r)); }
  /// The first row of the result in a section.
  std::int64_t output(const Operands& w, int section) const {
    return first_ + section * w.byte_rows;
  }

  /// y = sums · factor + bias for the outputs of a token. Args: of either linear.
  template <typename Args>
  void store(const Args& args, const Operands& w, std::int64_t token, __m256 sums,
             float factor) const {
    const std::int64_t size = size_of(args.type), section = kByteRows<qtype> * size;
    alignas(32) std::byte outputs[kOutputs * sizeof(float)] = {};
    __m256 bias = _mm256_setzero_ps();
    if (args.bias != nullptr) {
      const auto* from = static_cast<const std::byte*>(args.bias);
      for (int s = 0; s < kSections<qtype>; ++s) {
        std::memcpy(outputs + s * section, from + output(w, s) * size, rows_ * size);
      }
      bias = load_rows(outputs, 0, args.type);
    }
    store_rows(outputs, 0, args.type, kOutputs,
               _mm256_fmadd_ps(sums, _mm256_set1_ps(factor), bias));
    auto* to = static_cast<std::byte*>(args.y) + token * args.y_stride * size;
    for (int s = 0; s < kSections<qtype>; ++s) {
      std::memcpy(to + output(w, s) * size, outputs + s * section, rows_ * size);
    }
  }

 private:
  std::int64_t first_, rows_;
};

template <QTypeId qtype>
std::int64_t steps_of(const Operands& w) {
  return (w.byte_rows + kByteRows<qtype> - 1) / kByteRows<qtype>;
}

/// Scales and shifts of the outputs of a step: [output][group].
template <QTypeId qtype>
class StepScales {
 public:
  explicit StepScales(std::int64_t groups)
      : groups_(groups), values_((kSections<qtype> > 1 ? 2 : 1) * kOutputs * groups) {}

  void load(const Operands& w, const Step<qtype>& step) const {
    const FloatType type = w.layout.spec().scale_type;
    for (int s = 0; s < kSections<qtype>; ++s) {
      const std::int64_t index = step.output(w, s) * groups_, count = step.rows() * groups_;
      const std::int64_t to = s * kByteRows<qtype> * groups_;
      load_floats(w.weight.scale, index, count, type, scales() + to);
      if (kSections<qtype> > 1) load_floats(w.weight.shift, index, count, type, shifts() + to);
    }
  }
  float* scales() const { return values_.data(); }
  float* shifts() const { return values_.data() + kOutputs * groups_; }

 private:
  std::int64_t groups_;
  Scratch values_;
};

/// Σ of each of 8 vectors.
inline __m256 sums_of(const __m256 (&v)[kOutputs]) {
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                       _mm256_permute2f128_ps(low, high, 0x31));
}
/// How far ahead to prefetch at a column of a byte row: in the row, then in the next step's.
template <QTypeId qtype>
std::int64_t prefetch_distance(const Operands& w, std::int64_t column) {
  const bool in_row = column + kPrefetchBytes < w.columns();
  return kPrefetchBytes + (in_row ? 0 : (kByteRows<qtype> - 1) * w.columns());
}

inline void prefetch(const std::uint8_t* bytes) {
  _mm_prefetch(reinterpret_cast<const char*>(bytes), _MM_HINT_T0);
}

inline Operands operands_of(const PackedLayout& layout, const CanonicalWeight& weight) {
  const std::int64_t sections = layout.depth() / 4;
  return {layout, weight, layout.spec().rows / sections, layout.groups(), layout.group_columns(0)};
}

}  // namespace
}  // namespace quantal::kernels
