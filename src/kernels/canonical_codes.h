#pragma once

#include <cstdint>

#include "kernels/packed_layout.h"

namespace quantal::kernels {

/// Where the codes of a weight lie in canonical form (docs/formats.md): code rows, one a group of a
/// row, of `width` codes each. Narrow codes are split along that first dimension: byte row p holds
/// code rows p, p + packed_rows, …, the first of them in the lowest bits.
class CanonicalCodes {
 public:
  explicit CanonicalCodes(const WeightSpec& spec)
      : bits_(spec.qtype == QTypeId::kInt2   ? 2
              : spec.qtype == QTypeId::kInt4 ? 4
                                             : 8),
        columns_(spec.columns),
        width_(spec.group_size > 0 ? spec.group_size : spec.columns),
        groups_(width_ > 0 && columns_ > 0 ? ceil_div(columns_, width_) : 1),
        code_rows_(spec.rows * groups_),
        packed_rows_(ceil_div(code_rows_, 8 / bits_)) {}

  int bits() const { return bits_; }
  /// How many code rows share a byte row.
  std::int64_t sections() const { return 8 / bits_; }
  std::int64_t width() const { return width_; }
  std::int64_t groups() const { return groups_; }
  std::int64_t code_rows() const { return code_rows_; }
  std::int64_t packed_rows() const { return packed_rows_; }
  /// Bytes of the codes.
  std::int64_t size() const { return packed_rows_ * width_; }

  std::int64_t code_row(std::int64_t row, std::int64_t group) const {
    return row * groups_ + group;
  }
  /// Where a code row is: the first byte, and the bit in each.
  std::int64_t byte(std::int64_t code_row) const { return code_row % packed_rows_ * width_; }
  int shift(std::int64_t code_row) const {
    return bits_ * static_cast<int>(code_row / packed_rows_);
  }

  /// The elements of a dense weight that a code row stands for: the first, and how many (the rest
  /// of a short last group is padding).
  std::int64_t element(std::int64_t code_row) const {
    if (is_even()) return code_row * width_;
    return code_row / groups_ * columns_ + code_row % groups_ * width_;
  }
  std::int64_t columns(std::int64_t code_row) const {
    if (is_even() || code_row % groups_ + 1 < groups_) return width_;
    return columns_ - (groups_ - 1) * width_;
  }

 private:
  static constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
  bool is_even() const { return groups_ * width_ == columns_; }

  int bits_;
  std::int64_t columns_;
  std::int64_t width_;
  std::int64_t groups_;
  std::int64_t code_rows_;
  std::int64_t packed_rows_;
};

}  // namespace quantal::kernels
