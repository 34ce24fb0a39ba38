// The CPU kernels for canonical codes give what the ATen functions give, bit for bit. A quantizer
// of the user's own takes the ATen path: so both are asked for the same weight.
#include <limits>

#include "tensor/support.h"

namespace quantal {
namespace {

using namespace test;

constexpr double kLargestFloat = std::numeric_limits<float>::max();

// What the built-in quantizer chooses, by a name that kernels do not know.
struct ByAten final : Quantizer {
  std::string_view name() const override { return "by ATen"; }
  bool supports(const QType&) const override { return true; }
  ScaleShift operator()(const at::Tensor& groups, const QType& qtype) const override {
    return (*default_quantizer(qtype))(groups, qtype);
  }
};

::testing::AssertionResult same_bits(const char* what, const at::Tensor& a, const at::Tensor& b) {
  if (a.defined() != b.defined()) return ::testing::AssertionFailure() << what << ": one is absent";
  if (!a.defined()) return ::testing::AssertionSuccess();
  if (a.sizes() != b.sizes() || a.scalar_type() != b.scalar_type()) {
    return ::testing::AssertionFailure() << what << ": " << a.scalar_type() << " " << a.sizes()
                                         << ", not " << b.scalar_type() << " " << b.sizes();
  }
  if (at::equal(a.contiguous().view(at::kByte), b.contiguous().view(at::kByte))) {
    return ::testing::AssertionSuccess();
  }
  return ::testing::AssertionFailure() << what << " differs";
}

void expect_same_codes(const at::Tensor& weight, WeightOptions options) {
  const QuantizedParts found = parts(quantize_weight(weight, options));
  options.quantizer = std::make_shared<ByAten>();
  const at::Tensor reference = quantize_weight(weight, options);
  const QuantizedParts wanted = parts(reference);
  EXPECT_TRUE(same_bits("data", found.data, wanted.data));
  EXPECT_TRUE(same_bits("scale", found.scale, wanted.scale));
  EXPECT_TRUE(same_bits("shift", found.shift, wanted.shift));
  options.quantizer = nullptr;
  EXPECT_TRUE(same(value_of(quantize_weight(weight, options)), value_of(reference)));
}

// Weights that are hard on arithmetic, of a shape.
std::vector<at::Tensor> hard_weights(at::IntArrayRef sizes, at::ScalarType dtype) {
  const at::Tensor x = normal(sizes, at::kDouble);
  const at::Tensor one = normal(sizes, at::kDouble, 2);
  const at::Tensor signs = at::where(one > 0, at::zeros({}), at::full({}, -0.0));
  const at::Tensor powers = at::arange(x.numel(), at::kDouble).fmod(60).sub(149).reshape(sizes);
  std::vector<at::Tensor> weights = {
      x * 0.03,
      x * 1e-6,                                      // scales too small for fp16
      x * 0.01 + 100,                                // shifts too coarse for 16 bits
      x * at::pow(at::full({}, 2.0), powers),        // subnormal numbers and others
      at::full(sizes, -3.140625),                    // a constant
      signs,                                         // 0 and -0
      at::where(one > 0.5, x, signs),                // zeros among others
      at::where(one > 0, x.abs(), signs),            // a minimum of 0 or -0
      x.clamp(-1, 1) * 65504,                        // the largest of fp16
      at::where(one > 0, x, x * 1e30),               // an enormous range
      x.clamp(-1, 1) * (kLargestFloat / 16),         // near what fp32 computes
      x.clamp(-1, 1) * kLargestFloat,                // beyond it
      x.abs().clamp(0.5, 1) * (kLargestFloat / 2)};  // a large shift
  for (at::Tensor& weight : weights) {
    const double largest = dtype == at::kHalf       ? 65504
                           : dtype == at::kBFloat16 ? 0x1.FEp127
                                                    : kLargestFloat;
    weight = weight.clamp(-largest, largest).to(at::kFloat).to(dtype);
  }
  return weights;
}

class Kernels : public ::testing::TestWithParam<std::tuple<QType, at::ScalarType>> {
 protected:
  QType qtype() const { return std::get<0>(GetParam()); }
  at::ScalarType dtype() const { return std::get<1>(GetParam()); }
};

TEST_P(Kernels, quantize_as_aten_does) {
  const std::vector<Sizes> shapes = {{1, 1},    {3, 7},    {2, 33},       {5, 160},  {17, 129},
                                     {4, 1023}, {6, 640},  {5, 3, 3, 3},  {9, 1024}, {3, 4, 5},
                                     {1, 384},  {64, 256}, {2, 16, 3, 3}, {31, 96},  {16, 8}};
  for (const Sizes& sizes : shapes) {
    int kind = 0;
    for (const at::Tensor& weight : hard_weights(sizes, dtype())) {
      SCOPED_TRACE(::testing::Message() << sizes << ", kind " << kind++);
      expect_same_codes(weight, {.qtype = qtype()});
    }
  }
}

TEST_P(Kernels, quantize_groups_of_any_size_as_aten_does) {
  if (!qtype().is_affine()) return;
  for (const std::int64_t group : {1, 2, 24, 32, 128, 200}) {
    for (const Sizes& sizes : {Sizes{1, 130}, {3, 48}, {5, 257}}) {
      int kind = 0;
      for (const at::Tensor& weight : hard_weights(sizes, dtype())) {
        SCOPED_TRACE(::testing::Message() << sizes << " by " << group << ", kind " << kind++);
        expect_same_codes(weight,
                          {.qtype = qtype(), .group_size = group, .allow_short_group = true});
      }
    }
  }
}

TEST_P(Kernels, quantize_views_as_aten_does) {
  const at::Tensor weight = normal({12, 320}, dtype());
  for (const at::Tensor& view :
       {weight.t(), weight.slice(0, 1, 12, 3), weight.slice(1, 3, 163), weight.neg(),
        weight.slice(0, 0, 1).expand({5, 320}), at::_neg_view(weight)}) {
    expect_same_codes(view, {.qtype = qtype()});
  }
}

// scale · code − shift in fp32, rounded once, as numbers of docs/formats.md.
at::Tensor rows_by_aten(const at::Tensor& codes, const QuantizedParts& found,
                        const at::Tensor& indices, at::IntArrayRef sizes, at::ScalarType dtype) {
  at::Tensor value = codes.to(at::kFloat) * found.scale.to(at::kFloat).reshape({-1, 1});
  if (found.shift.defined()) value = value - found.shift.to(at::kFloat).reshape({-1, 1});
  value = value.reshape({sizes[0], -1}).narrow(1, 0, sizes[1]).index_select(0, indices);
  if (dtype == at::kHalf) value = value.clamp(-65504, 65504);
  return value.to(dtype);
}

at::Tensor unpacked(const QuantizedParts& found, std::int64_t code_rows) {
  if (!found.qtype.is_affine()) return found.data;
  std::vector<at::Tensor> sections;
  for (int bit = 0; bit < 8; bit += found.qtype.bits) {
    sections.push_back(
        found.data.bitwise_right_shift(bit).bitwise_and((1 << found.qtype.bits) - 1));
  }
  return at::cat(sections).narrow(0, 0, code_rows);
}

TEST_P(Kernels, gather_as_aten_does) {
  const at::Tensor indices = at::tensor({4, 0, 0, 3, 1, 2, 4}, at::kLong);
  for (const std::int64_t columns : {1, 7, 16, 33, 160, 384, 1023}) {
    for (const at::Tensor& weight : hard_weights({5, columns}, dtype())) {
      const at::Tensor q = quantize_weight(weight, {.qtype = qtype()});
      const at::Tensor canonical = at::embedding(q, indices);
      const QuantizedParts found = parts(q);
      const double reach = found.scale.to(at::kDouble).max().item<double>();
      if (reach > kLargestFloat / 1e6) continue;  // computed in fp64: see numerics_test.cc
      const at::Tensor wanted =
          rows_by_aten(unpacked(found, found.scale.size(0)), found, indices, {5, columns}, dtype());
      EXPECT_TRUE(same_bits("canonical", canonical, wanted)) << columns;
      // A linear packs the weight.
      at::linear(normal({2, columns}, dtype()), q);
      EXPECT_TRUE(same_bits("packed", at::embedding(q, indices), wanted)) << columns;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, Kernels,
                         ::testing::Combine(::testing::ValuesIn(all_qtypes()),
                                            ::testing::Values(at::kFloat, at::kBFloat16,
                                                              at::kHalf)),
                         [](const auto& info) {
                           return std::string(std::get<0>(info.param).name) + "_" +
                                  at::toString(std::get<1>(info.param));
                         });

}  // namespace
}  // namespace quantal
