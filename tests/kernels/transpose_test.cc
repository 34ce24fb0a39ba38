#include "kernels/transpose.h"

#include <numeric>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/guarded_bytes.h"

namespace quantal::kernels {
namespace {

/// A matrix with its rows `gap` elements from each other, against a guard page.
template <typename Element>
struct Matrix {
  Matrix(std::int64_t row_count, std::int64_t column_count, std::int64_t gap, Edge edge)
      : rows(row_count),
        columns(column_count),
        stride(columns + gap),
        bytes(((rows - 1) * stride + columns) * static_cast<std::int64_t>(sizeof(Element)), edge),
        data(reinterpret_cast<Element*>(bytes.data())) {
    std::iota(data, data + (rows - 1) * stride + columns, Element{});
  }
  Element at(std::int64_t row, std::int64_t column) const { return data[row * stride + column]; }

  std::int64_t rows, columns, stride;
  GuardedBytes bytes;
  Element* data;
};

constexpr std::int64_t kSizes[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 20, 33, 48};

template <typename Element, typename Run>
void expect_transposed(const Run& run) {
  for (const std::int64_t rows : kSizes) {
    for (const std::int64_t columns : kSizes) {
      for (const Edge edge : kEdges) {
        const Matrix<Element> from(rows, columns, 2, edge);
        const Matrix<Element> to(columns, rows, 1, edge);
        run(from, to);
        for (std::int64_t r = 0; r < rows; ++r) {
          for (std::int64_t c = 0; c < columns; ++c) {
            ASSERT_EQ(to.at(c, r), from.at(r, c)) << rows << " x " << columns;
          }
        }
        for (std::int64_t c = 0; c + 1 < columns; ++c) {
          ASSERT_EQ(to.at(c, rows), static_cast<Element>(c * to.stride + rows));
        }
      }
    }
  }
}

template <typename Element>
class Transpose : public testing::Test {};
using Elements = testing::Types<std::int8_t, std::uint16_t, float>;
TYPED_TEST_SUITE(Transpose, Elements);

TYPED_TEST(Transpose, exchanges_rows_and_columns) {
  expect_transposed<TypeParam>([](const Matrix<TypeParam>& from, const Matrix<TypeParam>& to) {
    transpose(from.data, from.stride, from.rows, from.columns, to.data, to.stride);
  });
}

class TransposeFloats : public testing::TestWithParam<Isa> {};
INSTANTIATE_TEST_SUITE_P(EveryIsa, TransposeFloats, testing::ValuesIn(supported_isas()),
                         [](const auto& info) { return std::string(isa_name(info.param)); });

TEST_P(TransposeFloats, exchanges_rows_and_columns) {
  expect_transposed<float>([](const Matrix<float>& from, const Matrix<float>& to) {
    transpose_floats(GetParam(), from.data, from.stride, from.rows, from.columns, to.data,
                     to.stride);
  });
}

TEST(Interleave, is_the_transpose_without_gaps) {
  for (const std::int64_t channels : {1, 2, 3, 5, 8, 15, 16, 17}) {
    for (const std::int64_t pixels : {1, 2, 15, 16, 17, 22, 40, 100}) {
      for (const Edge edge : kEdges) {
        const Matrix<std::int8_t> from(channels, pixels, 3, edge);
        const Matrix<std::int8_t> to(pixels, channels, 0, edge);
        interleave(from.data, from.stride, channels, pixels, to.data);
        for (std::int64_t p = 0; p < pixels; ++p) {
          for (std::int64_t c = 0; c < channels; ++c) ASSERT_EQ(to.at(p, c), from.at(c, p));
        }
      }
    }
  }
}

TEST(GatherPixels, puts_each_where_it_belongs) {
  for (const std::int64_t channels : {1, 7, 16, 17, 40}) {
    for (const std::int64_t pixels : {1, 9, 16, 17, 50}) {
      for (const Edge edge : kEdges) {
        const Matrix<std::int8_t> from(channels, pixels, 3, edge);
        const Matrix<std::int8_t> to(pixels, channels, 1, edge);
        std::vector<std::int8_t*> at(pixels);
        for (std::int64_t p = 0; p < pixels; ++p) {
          at[p] = to.data + (pixels - 1 - p) * to.stride;
        }
        gather_pixels(from.data, from.stride, channels, at);
        for (std::int64_t p = 0; p < pixels; ++p) {
          for (std::int64_t c = 0; c < channels; ++c) ASSERT_EQ(at[p][c], from.at(c, p));
        }
      }
    }
  }
}

}  // namespace
}  // namespace quantal::kernels
