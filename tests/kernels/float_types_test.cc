#include "kernels/float_types.h"

#include <cmath>
#include <limits>

#include <gtest/gtest.h>

namespace quantal::kernels {
namespace {

// The value of sign, exponent and mantissa fields, by the definition of the format.
double by_definition(unsigned code, int exponent_bits, int mantissa_bits, int bias) {
  const unsigned mantissa = code & ((1U << mantissa_bits) - 1);
  const unsigned exponent = code >> mantissa_bits & ((1U << exponent_bits) - 1);
  const double sign = code >> (mantissa_bits + exponent_bits) & 1U ? -1 : 1;
  const double fraction = std::ldexp(mantissa, -mantissa_bits);
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias);
  return sign * std::ldexp(1 + fraction, static_cast<int>(exponent) - bias);
}

TEST(FloatTypes, float8_codes_have_their_values) {
  for (unsigned code = 0; code < 256; ++code) {
    const auto byte = static_cast<std::uint8_t>(code);
    const bool is_nan = (code & 0x7F) == 0x7F, is_special = (code & 0x7C) == 0x7C;
    EXPECT_TRUE(is_nan || e4m3fn_value(byte) == by_definition(code, 4, 3, 7)) << code;
    EXPECT_TRUE(code == 0x80 || e4m3fnuz_value(byte) == by_definition(code, 4, 3, 8)) << code;
    EXPECT_TRUE(is_special || e5m2_value(byte) == by_definition(code, 5, 2, 15)) << code;
  }
  EXPECT_TRUE(std::isnan(e4m3fn_value(0x7F)));
  EXPECT_TRUE(std::isnan(e4m3fn_value(0xFF)));
  EXPECT_TRUE(std::isnan(e4m3fnuz_value(0x80)));
  EXPECT_TRUE(std::isinf(e5m2_value(0x7C)));
  EXPECT_TRUE(std::isnan(e5m2_value(0x7D)));
}

TEST(FloatTypes, every_half_loads_and_stores_as_itself) {
  for (unsigned code = 0; code < 65536; ++code) {
    const auto bits = static_cast<std::uint16_t>(code);
    for (const FloatType type : {FloatType::kF16, FloatType::kBF16}) {
      const int exponent = type == FloatType::kF16 ? 5 : 8;
      const float value = load_float(&bits, 0, type);
      const unsigned all_ones = (1U << exponent) - 1;
      const bool finite = (code >> (15 - exponent) & all_ones) != all_ones;
      if (finite) {
        EXPECT_EQ(value, by_definition(code, exponent, 15 - exponent, (1 << (exponent - 1)) - 1));
      }
      std::uint16_t stored = 0;
      store_float(&stored, 0, type, value);
      if (std::isnan(value)) {
        EXPECT_TRUE(std::isnan(load_float(&stored, 0, type)));
      } else {
        EXPECT_EQ(stored, bits);
      }
    }
  }
}

// Between two neighbours: below the middle down, above it up, in the middle to the even one.
TEST(FloatTypes, stores_round_half_to_even) {
  for (const FloatType type : {FloatType::kF16, FloatType::kBF16}) {
    const unsigned top = type == FloatType::kF16 ? 0x7BFF : 0x7F7F;
    for (unsigned code = 0; code < top; ++code) {
      const auto low = static_cast<std::uint16_t>(code);
      const auto high = static_cast<std::uint16_t>(code + 1);
      const float middle = static_cast<float>(
          (static_cast<double>(load_float(&low, 0, type)) + load_float(&high, 0, type)) / 2);
      const auto stored = [&](float value) {
        std::uint16_t bits = 0;
        store_float(&bits, 0, type, value);
        return bits;
      };
      ASSERT_EQ(stored(middle), code % 2 == 0 ? low : high) << code;
      ASSERT_EQ(stored(std::nextafter(middle, 0.0F)), low) << code;
      ASSERT_EQ(stored(std::nextafter(middle, INFINITY)), high) << code;
    }
  }
}

// Every finite code is its value's, and between two neighbours the nearer one is, or the even one.
TEST(FloatTypes, float8_codes_are_the_nearest) {
  struct Type {
    float (*value)(std::uint8_t);
    std::uint8_t (*code)(float);
    int top;  // the code of the largest number
  };
  for (const Type& type : {Type{e4m3fn_value, e4m3fn_code, 0x7E},
                           {e4m3fnuz_value, e4m3fnuz_code, 0x7F},
                           {e5m2_value, e5m2_code, 0x7B}}) {
    for (int code = 0; code <= type.top; ++code) {
      const float low = type.value(static_cast<std::uint8_t>(code));
      const int negative = code == 0 && type.code == e4m3fnuz_code ? 0 : code | 0x80;
      ASSERT_EQ(type.code(low), code);
      ASSERT_EQ(type.code(-low), negative);
      if (code == type.top) continue;
      const float high = type.value(static_cast<std::uint8_t>(code + 1));
      const float middle = (low + high) / 2;
      ASSERT_EQ(type.code(middle), code % 2 == 0 ? code : code + 1);
      ASSERT_EQ(type.code(std::nextafter(middle, 0.0F)), code);
      ASSERT_EQ(type.code(std::nextafter(middle, INFINITY)), code + 1);
    }
    EXPECT_EQ(type.code(std::numeric_limits<float>::denorm_min()), 0);
  }
}

TEST(FloatTypes, numbers_beyond_the_largest_are_infinite) {
  std::uint16_t bits = 0;
  store_float(&bits, 0, FloatType::kF16, 65519.996F);
  EXPECT_EQ(bits, 0x7BFF);
  store_float(&bits, 0, FloatType::kF16, -65520.0F);
  EXPECT_EQ(bits, 0xFC00);
  store_float(&bits, 0, FloatType::kBF16, std::numeric_limits<float>::max());
  EXPECT_EQ(bits, 0x7F80);
}

}  // namespace
}  // namespace quantal::kernels
