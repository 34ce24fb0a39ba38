#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/packed_layout.h"

namespace quantal::kernels {

inline bool is_affine(QTypeId qtype) { return qtype == QTypeId::kInt2 || qtype == QTypeId::kInt4; }

/// A random weight in canonical form, and its value by the definition in docs/formats.md.
struct RandomWeight {
  WeightSpec spec;
  std::int64_t groups;  ///< of a row
  std::vector<std::uint8_t> data;
  std::vector<std::byte> scale, shift;

  explicit RandomWeight(const WeightSpec& s, unsigned seed = 0)
      : spec(s), groups(PackedLayout(s).groups()) {
    std::mt19937 random(seed);
    const std::int64_t count = spec.rows * groups, width = size_of(spec.scale_type);
    data.resize(canonical_data_size(spec));
    scale.resize(count * width);
    shift.resize(is_affine() ? count * width : 0);
    for (auto& byte : data) byte = static_cast<std::uint8_t>(random());
    std::uniform_real_distribution<float> positive(0.5F, 2.0F), any(-4.0F, 4.0F);
    for (std::int64_t i = 0; i < count; ++i) {
      store_float(scale.data(), i, spec.scale_type, positive(random));
      if (is_affine()) store_float(shift.data(), i, spec.scale_type, any(random));
    }
    make_valid();
  }

  bool is_affine() const { return bits() < 8; }
  int bits() const {
    return spec.qtype == QTypeId::kInt2 ? 2 : spec.qtype == QTypeId::kInt4 ? 4 : 8;
  }

  CanonicalWeight canonical() const {
    return {data.data(), scale.data(), is_affine() ? shift.data() : nullptr};
  }

  /// What an element is made of: scale · code − shift.
  struct Parts {
    double scale, code, shift;
    double value() const { return scale * code - shift; }
    /// What the roundings of a sum of it are relative to.
    double size() const { return std::abs(scale * code) + std::abs(shift); }
  };
  Parts parts(std::int64_t row, std::int64_t column) const {
    const std::int64_t group = spec.group_size > 0 ? column / spec.group_size : 0;
    const std::int64_t index = row * groups + group;
    return {load_float(scale.data(), index, spec.scale_type),
            code_at(index, column - group * spec.group_size),
            is_affine() ? load_float(shift.data(), index, spec.scale_type) : 0.0};
  }
  double value(std::int64_t row, std::int64_t column) const { return parts(row, column).value(); }

  /// Multiplies all scales and shifts, and with them the weight.
  void scale_by(float factor) {
    for (auto* numbers : {&scale, &shift}) {
      const auto count = static_cast<std::int64_t>(numbers->size()) / size_of(spec.scale_type);
      for (std::int64_t i = 0; i < count; ++i) {
        const float number = load_float(numbers->data(), i, spec.scale_type);
        store_float(numbers->data(), i, spec.scale_type, number * factor);
      }
    }
  }

  /// Makes values multiples of a half, far below what fp32 can hold: sums of them are exact.
  void make_whole() {
    std::mt19937 random(4);
    const auto count = static_cast<std::int64_t>(scale.size()) / size_of(spec.scale_type);
    for (std::int64_t i = 0; i < count; ++i) {
      store_float(scale.data(), i, spec.scale_type,
                  std::ldexp(1.0F, static_cast<int>(random() % 3) - 1));
      if (is_affine())
        store_float(shift.data(), i, spec.scale_type, static_cast<float>(random() % 9) - 4);
    }
    if (is_affine() || spec.qtype == QTypeId::kInt8) return;
    for (std::uint8_t& byte : data) byte = float8_code(static_cast<float>(random() % 15) - 7);
  }

 private:
  std::int64_t width() const { return spec.group_size > 0 ? spec.group_size : spec.columns; }

  std::uint8_t float8_code(float value) const {
    return spec.qtype == QTypeId::kFloat8E4M3FN     ? e4m3fn_code(value)
           : spec.qtype == QTypeId::kFloat8E4M3FNUZ ? e4m3fnuz_code(value)
                                                    : e5m2_code(value);
  }

  std::uint8_t raw_code(std::int64_t code_row, std::int64_t column) const {
    const std::int64_t per_byte = 8 / bits();
    const std::int64_t rows = spec.rows * groups;
    const std::int64_t packed_rows = (rows + per_byte - 1) / per_byte;
    const std::uint8_t byte = data[code_row % packed_rows * width() + column];
    const auto bit = bits() * (code_row / packed_rows);
    return static_cast<std::uint8_t>(byte >> bit & ((1 << bits()) - 1));
  }

  double code_at(std::int64_t code_row, std::int64_t column) const {
    const std::uint8_t code = raw_code(code_row, column);
    switch (spec.qtype) {
      case QTypeId::kInt8:
        return static_cast<std::int8_t>(code);
      case QTypeId::kFloat8E4M3FN:
        return e4m3fn_value(code);
      case QTypeId::kFloat8E4M3FNUZ:
        return e4m3fnuz_value(code);
      case QTypeId::kFloat8E5M2:
        return e5m2_value(code);
      default:
        return code;
    }
  }

  // float8 without NaN and infinity; padding as the canonical form has it.
  void make_valid() {
    for (std::uint8_t& byte : data) {
      if (spec.qtype == QTypeId::kFloat8E4M3FN && (byte & 0x7F) == 0x7F) byte ^= 1;
      if (spec.qtype == QTypeId::kFloat8E4M3FNUZ && byte == 0x80) byte = 0;
      if (spec.qtype == QTypeId::kFloat8E5M2 && (byte & 0x7C) == 0x7C) byte &= 0x83;
    }
    if (!is_affine()) return;
    const std::int64_t rows = spec.rows * groups, per_byte = 8 / bits();
    const std::int64_t packed_rows = (rows + per_byte - 1) / per_byte;
    const std::int64_t last = width() > 0 ? spec.columns - (groups - 1) * width() : 0;
    std::vector<std::uint8_t> valid(data.size());
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t column = 0; column < width(); ++column) {
        const bool padding = row % groups == groups - 1 && column >= last;
        const std::uint8_t code = raw_code(row, padding ? last - 1 : column);
        valid[row % packed_rows * width() + column] |=
            static_cast<std::uint8_t>(code << bits() * (row / packed_rows));
      }
    }
    data = valid;
  }
};

inline const std::vector<QTypeId> kAllTypes = {QTypeId::kInt2,           QTypeId::kInt4,
                                               QTypeId::kInt8,           QTypeId::kFloat8E4M3FN,
                                               QTypeId::kFloat8E4M3FNUZ, QTypeId::kFloat8E5M2};

inline std::string type_name(QTypeId id) {
  for (const QType& type : all_qtypes()) {
    if (type.id == id) return std::string(type.name);
  }
  return "?";
}

using IsaAndType = std::tuple<Isa, QTypeId>;
inline std::string name_of(const testing::TestParamInfo<IsaAndType>& info) {
  return std::string(isa_name(std::get<0>(info.param))) + "_" + type_name(std::get<1>(info.param));
}

}  // namespace quantal::kernels
