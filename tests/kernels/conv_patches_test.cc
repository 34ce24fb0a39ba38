#include "kernels/conv_patches.h"

#include <cstring>
#include <numeric>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/guarded_bytes.h"

namespace quantal::kernels {
namespace {

using Extent = ConvShape::Extent;

template <typename Element>
class ConvPatches : public testing::Test {};
using Elements = testing::Types<std::int8_t, std::uint16_t, float>;
TYPED_TEST_SUITE(ConvPatches, Elements);

// Any part of the positions, from memory that begins or ends at a guard page, into such memory.
template <typename Element>
void expect_patches(const ConvShape& shape, std::int64_t first, std::int64_t count, Edge edge) {
  const std::int64_t pixels = shape.pixels(), channels = shape.channels;
  const std::int64_t stride = shape.columns() + kPatchSlack;
  const GuardedBytes input(channels * pixels * sizeof(Element), edge);
  const GuardedBytes output(count * stride * sizeof(Element), edge);
  auto* in = reinterpret_cast<Element*>(input.data());
  auto* out = reinterpret_cast<Element*>(output.data());
  for (std::int64_t i = 0; i < channels * pixels; ++i) in[i] = static_cast<Element>(1 + i % 127);
  write_patches(shape, in, first, count, out, stride);
  for (std::int64_t i = 0; i < count; ++i) {
    const Extent at = index_at(first + i, shape.output());
    for (std::int64_t column = 0; column < shape.columns(); ++column) {
      const std::int64_t channel = column / shape.taps();
      const std::int64_t pixel = shape.pixel(at, index_at(column % shape.taps(), shape.kernel));
      const std::int64_t from = patch_order(shape) == ChannelOrder::kLast
                                    ? pixel * channels + channel
                                    : channel * pixels + pixel;
      ASSERT_EQ(out[i * stride + column], pixel < 0 ? Element{} : in[from])
          << "position " << first + i << ", column " << column;
    }
  }
}

TYPED_TEST(ConvPatches, are_what_the_kernel_covers) {
  for (const std::int64_t width : {1, 2, 3, 4, 5, 7, 8, 9, 16, 17}) {
    for (const std::int64_t stride : {1, 2, 3}) {
      for (const std::int64_t dilation : {1, 2}) {
        for (const std::int64_t padding : {0, 1, 4, 40}) {
          const ConvShape shape{.channels = 2,
                                .rows = 1,
                                .input = {2, 3, 40},
                                .kernel = {2, 3, width},
                                .stride = {1, 2, stride},
                                .padding = {1, 1, padding},
                                .dilation = {1, 1, dilation}};
          const std::int64_t positions = shape.positions();
          for (const Edge edge : kEdges) {
            expect_patches<TypeParam>(shape, 0, positions, edge);
            expect_patches<TypeParam>(shape, positions / 3, positions / 2, edge);
          }
        }
      }
    }
  }
}

TYPED_TEST(ConvPatches, of_one_tap_are_pixels) {
  for (const std::int64_t stride : {1, 2}) {
    for (const std::int64_t padding : {0, 2}) {
      const ConvShape shape{.channels = 5,
                            .rows = 1,
                            .input = {1, 4, 7},
                            .stride = {1, 1, stride},
                            .padding = {0, padding, padding}};
      for (const Edge edge : kEdges) {
        expect_patches<TypeParam>(shape, 0, shape.positions(), edge);
        expect_patches<TypeParam>(shape, 3, 5, edge);
      }
    }
  }
}

}  // namespace
}  // namespace quantal::kernels
