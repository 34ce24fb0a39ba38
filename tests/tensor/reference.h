#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <ATen/ATen.h>

#include <quantal/qtype.h>

/// Quantization as plain loops, one number at a time: what the library's tensors are compared with.
namespace quantal::test {

struct Float8 {
  int exponent_bits;
  int mantissa_bits;
  int bias;
  bool has_infinity;  ///< the top exponent is Inf and NaN (e5m2)
  bool is_fnuz;       ///< 0x80 is the only NaN
};

inline Float8 float8_of(const QType& qtype) {
  if (qtype == qfloat8_e5m2) return {5, 2, 15, true, false};
  if (qtype == qfloat8_e4m3fnuz) return {4, 3, 8, false, true};
  return {4, 3, 7, false, false};
}

/// The number that `byte` stands for; NaN where it is none.
inline double decode_float8(const Float8& format, int byte) {
  const int magnitude = byte & 0x7f;
  const int exponent = magnitude >> format.mantissa_bits;
  const int mantissa = magnitude & ((1 << format.mantissa_bits) - 1);
  const int top = (1 << format.exponent_bits) - 1;
  const bool no_number = format.is_fnuz        ? byte == 0x80
                         : format.has_infinity ? exponent == top
                                               : magnitude == 0x7f;
  if (no_number) return std::numeric_limits<double>::quiet_NaN();
  const double fraction = std::ldexp(mantissa, -format.mantissa_bits);
  const double size = exponent == 0 ? std::ldexp(fraction, 1 - format.bias)
                                    : std::ldexp(1 + fraction, exponent - format.bias);
  return byte & 0x80 ? -size : size;
}

/// The nearest number of the format; ties go to the even mantissa, what is beyond to the largest.
inline double round_to_float8(const Float8& format, double x) {
  int best = 0;
  for (int byte = 0; byte < 128; ++byte) {
    const double value = decode_float8(format, byte);
    if (std::isnan(value)) continue;
    const double distance = std::abs(std::abs(x) - value);
    const double best_distance = std::abs(std::abs(x) - decode_float8(format, best));
    if (distance < best_distance || (distance == best_distance && byte % 2 == 0)) best = byte;
  }
  return std::copysign(decode_float8(format, best), x);
}

/// x as a number of `dtype`.
inline double round_to(at::ScalarType dtype, double x) {
  if (dtype == at::kFloat) return static_cast<float>(x);
  if (dtype == at::kBFloat16) return static_cast<float>(c10::BFloat16(static_cast<float>(x)));
  if (dtype == at::kHalf) {
    return static_cast<float>(c10::Half(static_cast<float>(std::clamp(x, -65504.0, 65504.0))));
  }
  return x;
}

struct Quantized {
  std::vector<double> codes;  ///< float8: the code's number
  std::vector<double> values;
  std::vector<double> scales;  ///< one a group
  std::vector<double> shifts;  ///< one a group; empty for symmetric types
};

// A product that no compiler fuses with the sum that follows.
template <typename T>
T product(T a, T b) {
  const volatile T result = a * b;
  return result;
}

/// One group in T arithmetic; `stored`: the dtype to which scale and shift are rounded.
template <typename T>
void quantize_group(const std::vector<double>& w, const QType& qtype, at::ScalarType stored,
                    Quantized& out) {
  constexpr T tiny = std::numeric_limits<T>::min();
  const double levels = qtype.is_affine() ? (1 << qtype.bits) - 1 : qtype.qmax;
  const double low = *std::min_element(w.begin(), w.end());
  const double high = *std::max_element(w.begin(), w.end());
  const T range = qtype.is_affine() ? static_cast<T>(high) - static_cast<T>(low)
                                    : static_cast<T>(std::max(std::abs(low), std::abs(high)));
  const double step = qtype.is_floating_point ? decode_float8(float8_of(qtype), 1) : 1;
  T scale = range < tiny
                ? T(1)
                : std::max(range / static_cast<T>(levels), static_cast<T>(2 * tiny / step));
  scale = static_cast<T>(round_to(stored, scale));
  const T shift = static_cast<T>(round_to(stored, -low));
  out.scales.push_back(scale);
  if (qtype.is_affine()) out.shifts.push_back(shift);
  for (const double element : w) {
    const T x = static_cast<T>(element);
    double code;
    if (qtype.is_affine()) {
      code = std::clamp(std::nearbyint(static_cast<double>((x + shift) / scale)), 0.0, levels);
    } else if (qtype.is_floating_point) {
      code = round_to_float8(float8_of(qtype), x / scale);
    } else {
      code = std::clamp(std::nearbyint(static_cast<double>(x / scale)), qtype.qmin, qtype.qmax);
    }
    out.codes.push_back(code);
    const T value = product(scale, static_cast<T>(code));
    out.values.push_back(qtype.is_affine() ? value - shift : value);
  }
}

/// `weight` (rows × row elements) of numbers of `dtype`, in groups of `group` (0: whole rows; a
/// short last one stays short). `stored`: the dtype of scale and shift.
inline Quantized reference_quantize(const std::vector<double>& weight, std::int64_t row,
                                    std::int64_t group, const QType& qtype, at::ScalarType dtype,
                                    at::ScalarType stored) {
  Quantized out;
  const std::int64_t step = group == 0 ? row : group;
  for (std::int64_t start = 0; start < static_cast<std::int64_t>(weight.size()); start += row) {
    for (std::int64_t k = 0; k < row; k += step) {
      const auto first = weight.begin() + start + k;
      const std::vector<double> elements(first, first + std::min(step, row - k));
      if (dtype == at::kDouble) {
        quantize_group<double>(elements, qtype, stored, out);
      } else {
        quantize_group<float>(elements, qtype, stored, out);
      }
    }
  }
  for (double& value : out.values) value = round_to(dtype, value);
  return out;
}

/// Codes packed as optimum-quanto packs them: `values` in rows, the first part of the rows in the
/// low bits.
inline std::vector<int> reference_pack(const std::vector<double>& values, std::int64_t row,
                                       int bits) {
  const auto rows = static_cast<std::int64_t>(values.size()) / row;
  const std::int64_t per_byte = 8 / bits;
  const std::int64_t packed_rows = (rows + per_byte - 1) / per_byte;
  std::vector<int> packed(static_cast<size_t>(packed_rows * row), 0);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t k = 0; k < row; ++k) {
      const int code = static_cast<int>(values[static_cast<size_t>(r * row + k)]);
      packed[static_cast<size_t>(r % packed_rows * row + k)] |=
          code << (bits * static_cast<int>(r / packed_rows));
    }
  }
  return packed;
}

}  // namespace quantal::test
