// Codes, scales and packing of weights, compared with plain loops.
#include "tensor/reference.h"
#include "tensor/support.h"

namespace quantal {
namespace {

using namespace test;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::int64_t row_of(const at::Tensor& weight) {
  return c10::multiply_integers(weight.sizes().slice(1));
}

// The codes of `parts`, one number an element of the weight.
std::vector<double> codes_of(const QuantizedParts& parts, at::IntArrayRef sizes) {
  if (!parts.qtype.is_affine()) return numbers(parts.data);
  const std::int64_t row = c10::multiply_integers(sizes.slice(1));
  const std::int64_t group = parts.group_size == 0 ? row : parts.group_size;
  const std::int64_t groups = (row + group - 1) / group;
  const std::vector<double> bytes = numbers(parts.data);
  const std::int64_t packed_rows = parts.data.size(0);
  std::vector<double> codes;
  for (std::int64_t r = 0; r < sizes[0]; ++r) {
    for (std::int64_t k = 0; k < row; ++k) {
      const std::int64_t code_row = r * groups + k / group;
      const auto byte =
          static_cast<int>(bytes[static_cast<size_t>(code_row % packed_rows * group + k % group)]);
      const auto shift = static_cast<int>(code_row / packed_rows) * parts.qtype.bits;
      codes.push_back(byte >> shift & ((1 << parts.qtype.bits) - 1));
    }
  }
  return codes;
}

void expect_reference(const at::Tensor& weight, const WeightOptions& options) {
  const at::Tensor q = quantize_weight(weight, options);
  const QuantizedParts found = parts(q);
  const Quantized wanted =
      reference_quantize(numbers(weight), row_of(weight), found.group_size, options.qtype,
                         weight.scalar_type(), found.scale.scalar_type());
  EXPECT_EQ(codes_of(found, weight.sizes()), wanted.codes);
  EXPECT_EQ(numbers(found.scale), wanted.scales);
  if (found.shift.defined()) {
    EXPECT_EQ(numbers(found.shift), wanted.shifts);
  }
  EXPECT_EQ(numbers(value_of(q)), wanted.values);
  EXPECT_EQ(q.sizes(), weight.sizes());
  EXPECT_EQ(q.scalar_type(), weight.scalar_type());
}

class Codes : public ::testing::TestWithParam<std::tuple<QType, at::ScalarType>> {
 protected:
  QType qtype() const { return std::get<0>(GetParam()); }
  at::ScalarType dtype() const { return std::get<1>(GetParam()); }
};

TEST_P(Codes, are_those_of_plain_loops) {
  for (const std::int64_t rows : {1, 3, 17}) {
    for (const std::int64_t row : kSizes) {
      SCOPED_TRACE(::testing::Message() << rows << " x " << row);
      expect_reference(normal({rows, row}, dtype(), static_cast<std::uint64_t>(row)),
                       {.qtype = qtype()});
    }
  }
}

TEST_P(Codes, are_those_of_plain_loops_in_convolutions) {
  expect_reference(normal({5, 3, 3, 3}, dtype()), {.qtype = qtype()});
  expect_reference(normal({4, 32, 3, 3}, dtype()), {.qtype = qtype()});
  expect_reference(normal({2, 16, 3, 3}, dtype()), {.qtype = qtype()});
  expect_reference(normal({3, 2, 2, 2, 2}, dtype()), {.qtype = qtype()});
  expect_reference(normal({3, 4, 5}, dtype()), {.qtype = qtype()});
}

TEST_P(Codes, keep_scales_in_the_dtype_of_ordinary_weights) {
  const QuantizedParts found =
      parts(quantize_weight(normal({64, 256}, dtype()), {.qtype = qtype()}));
  if (qtype() == qfloat8_e5m2 && dtype() == at::kHalf) {
    EXPECT_EQ(found.scale.scalar_type(), at::kFloat);  // absmax / 57344 is subnormal in half
    return;
  }
  EXPECT_EQ(found.scale.scalar_type(), dtype());
  if (qtype().is_affine()) {
    EXPECT_EQ(found.shift.scalar_type(), dtype());
  }
}

TEST_P(Codes, survive_a_round_trip_through_parts) {
  for (const Sizes& sizes : {Sizes{3, 7}, {5, 160}, {4, 16, 3, 3}, {1, 65}}) {
    const at::Tensor q = quantize_weight(normal(sizes, dtype()), {.qtype = qtype()});
    const at::Tensor again = weight_from_parts(parts(q), sizes, dtype());
    EXPECT_TRUE(is_frozen(again));
    EXPECT_TRUE(same(again, q));
  }
}

TEST_P(Codes, are_the_same_however_the_weight_lies_in_memory) {
  const at::Tensor dense = normal({6, 160}, dtype());
  const at::Tensor padded = at::zeros({13, 323}, dense.options());
  const at::Tensor strided = padded.slice(0, 1, 13, 2).slice(1, 3, 323, 2);
  strided.copy_(dense);
  const at::Tensor column_major = dense.t().contiguous().t();
  const auto expected = parts(quantize_weight(dense, {.qtype = qtype()}));
  for (const at::Tensor& weight : {strided, column_major}) {
    ASSERT_FALSE(weight.is_contiguous());
    const auto found = parts(quantize_weight(weight, {.qtype = qtype()}));
    EXPECT_EQ(numbers(found.data), numbers(expected.data));
    EXPECT_EQ(numbers(found.scale), numbers(expected.scale));
  }
  const at::Tensor image = normal({4, 8, 3, 3}, dtype());
  const auto last = image.contiguous(at::MemoryFormat::ChannelsLast);
  EXPECT_EQ(numbers(parts(quantize_weight(last, {.qtype = qtype()})).data),
            numbers(parts(quantize_weight(image, {.qtype = qtype()})).data));
  const at::Tensor repeated = normal({1, 40}, dtype()).expand({5, 40});
  EXPECT_EQ(numbers(parts(quantize_weight(repeated, {.qtype = qtype()})).data),
            numbers(parts(quantize_weight(repeated.contiguous(), {.qtype = qtype()})).data));
}

TEST_P(Codes, of_a_live_weight_are_those_of_the_frozen_one) {
  for (const std::int64_t row : kSizes) {
    const at::Tensor weight = normal({5, row}, dtype());
    const at::Tensor live = live_weight(weight, {.qtype = qtype()});
    const at::Tensor frozen = quantize_weight(weight, {.qtype = qtype()});
    EXPECT_TRUE(same(value_of(live), value_of(frozen)));
    freeze(live);
    EXPECT_TRUE(is_frozen(live));
    EXPECT_TRUE(same(live, frozen));
  }
}

INSTANTIATE_TEST_SUITE_P(All, Codes,
                         ::testing::Combine(::testing::ValuesIn(all_qtypes()),
                                            ::testing::ValuesIn(kDtypes)),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param).name) + "_" +
                                  at::toString(std::get<1>(info.param));
                         });

TEST(Groups, follow_optimum_quantos_rule_by_default) {
  const std::map<std::int64_t, std::int64_t> group_of_row = {
      {1, 0},     {127, 0},  {128, 0},  {129, 0},   {144, 0},  {160, 32}, {192, 96},
      {256, 128}, {320, 64}, {352, 32}, {384, 128}, {480, 96}, {1023, 0}, {1024, 128}};
  for (const auto& [row, group] : group_of_row) {
    for (const QType& qtype : {qint2, qint4}) {
      const auto found = parts(quantize_weight(normal({2, row}), {.qtype = qtype}));
      EXPECT_EQ(found.group_size, group) << row;
      EXPECT_EQ(found.scale.size(0), group == 0 ? 2 : 2 * row / group) << row;
    }
    EXPECT_EQ(parts(quantize_weight(normal({2, row}), {.qtype = qint8})).group_size, 0);
  }
}

TEST(Groups, may_be_any_divisor_of_the_row) {
  for (const QType& qtype : {qint2, qint4}) {
    for (const std::int64_t group : {1, 2, 3, 4, 6, 12, 16, 24, 48}) {
      expect_reference(normal({5, 48}), {.qtype = qtype, .group_size = group});
    }
    expect_reference(normal({5, 256}), {.qtype = qtype, .group_size = 0});
  }
}

TEST(Groups, may_end_in_a_short_one_on_request) {
  for (const QType& qtype : {qint2, qint4}) {
    for (const std::int64_t row : kSizes) {
      for (const std::int64_t group : {2, 32, 128}) {
        SCOPED_TRACE(::testing::Message() << row << " in groups of " << group);
        const WeightOptions options{.qtype = qtype, .group_size = group, .allow_short_group = true};
        expect_reference(normal({3, row}), options);
        expect_reference(normal({1, row}), options);
      }
    }
  }
}

TEST(Groups, that_do_not_fit_are_errors) {
  const at::Tensor weight = normal({4, 48});
  EXPECT_THAT(value_error_of([&] { quantize_weight(weight, {.qtype = qint4, .group_size = 32}); }),
              HasSubstr("group size that divides the row of 48"));
  EXPECT_THAT(value_error_of([&] { quantize_weight(weight, {.qtype = qint8, .group_size = 16}); }),
              HasSubstr("group size 0 for qint8, got 16"));
  EXPECT_THAT(value_error_of([&] { quantize_weight(weight, {.qtype = qint4, .group_size = -1}); }),
              HasSubstr("got -1"));
}

// Shape (10, 1): four-bit codes 0 … 9. The codes are exact multiples of the scale 1.
TEST(Packing, puts_the_first_half_of_the_rows_into_the_low_bits) {
  at::Tensor rows = at::zeros({10, 2});
  rows.select(1, 1).copy_(at::arange(10));
  rows = at::cat({rows, at::full({10, 1}, 15.0)}, 1);
  const auto found = parts(quantize_weight(rows, {.qtype = qint4}));
  EXPECT_THAT(numbers(found.data.select(1, 1)), ElementsAre(0x50, 0x61, 0x72, 0x83, 0x94));
  EXPECT_THAT(numbers(found.data.select(1, 0)), ElementsAre(0, 0, 0, 0, 0));
  EXPECT_THAT(numbers(found.data.select(1, 2)), ElementsAre(255, 255, 255, 255, 255));
}

TEST(Packing, fills_the_last_rows_with_zeros) {
  for (const QType& qtype : {qint2, qint4}) {
    for (std::int64_t rows = 1; rows <= 17; ++rows) {
      const at::Tensor weight = normal({rows, 3});
      const auto found = parts(quantize_weight(weight, {.qtype = qtype}));
      const auto wanted =
          reference_quantize(numbers(weight), 3, 0, qtype, at::kFloat, at::kFloat).codes;
      const auto packed = reference_pack(wanted, 3, qtype.bits);
      EXPECT_EQ(numbers(found.data), std::vector<double>(packed.begin(), packed.end())) << rows;
    }
  }
}

TEST(Packing, unpacks_every_byte) {
  const at::Tensor bytes = at::arange(256, at::kByte).reshape({256, 1});
  for (const QType& qtype : {qint2, qint4}) {
    const std::int64_t rows = 256 * 8 / qtype.bits;
    const at::Tensor q = weight_from_parts(
        {qtype, 0, bytes, at::ones({rows, 1}), at::zeros({rows, 1})}, {rows, 1}, at::kFloat);
    const std::vector<double> values = numbers(value_of(q));
    for (std::int64_t r = 0; r < rows; ++r) {
      const auto shift = static_cast<int>(r / 256) * qtype.bits;
      ASSERT_EQ(values[static_cast<size_t>(r)], r % 256 >> shift & ((1 << qtype.bits) - 1));
    }
  }
}

TEST(Rounding, takes_halves_to_the_even_code) {
  // Row maximum 127 makes the scale exactly 1.
  const std::vector<double> row = {127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 125.5, 126.5, -126.5};
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    if (dtype == at::kBFloat16) continue;  // 126.5 is no bfloat16
    const auto found = parts(quantize_weight(at::tensor(row).to(dtype).unsqueeze(0)));
    EXPECT_THAT(numbers(found.data), ElementsAre(127, 0, 2, 2, 0, -2, -2, 126, 126, -126));
  }
  const at::Tensor affine = at::tensor({0.0, 15.0, 0.5, 1.5, 2.5, 13.5, 14.5}).unsqueeze(0);
  EXPECT_THAT(numbers(parts(quantize_weight(affine, {.qtype = qint4})).data),
              ElementsAre(0, 15, 0, 2, 2, 14, 14));
}

TEST(Rounding, of_float8_is_to_nearest_even_everywhere) {
  for (const QType& qtype : {qfloat8_e4m3fn, qfloat8_e4m3fnuz, qfloat8_e5m2}) {
    const Float8 format = float8_of(qtype);
    std::vector<double> row = {qtype.qmax};  // scale 1
    for (int byte = 0; byte < 127; ++byte) {
      const double low = decode_float8(format, byte);
      const double high = decode_float8(format, byte + 1);
      if (!std::isfinite(low) || !std::isfinite(high)) continue;
      const double middle = (low + high) / 2;
      for (const double x : {low, middle, std::nextafter(static_cast<float>(middle), 0.0F) + 0.0}) {
        row.push_back(x);
        row.push_back(-x);
      }
    }
    const at::Tensor weight = at::tensor(row, at::kFloat).unsqueeze(0);
    std::vector<double> wanted;
    for (const double x : numbers(weight)) wanted.push_back(round_to_float8(format, x));
    EXPECT_EQ(numbers(value_of(quantize_weight(weight, {.qtype = qtype}))), wanted) << qtype.name;
  }
}

}  // namespace
}  // namespace quantal
