#include "kernels/conv_way.h"

#include <gtest/gtest.h>

#include "kernels/cpu/detect.h"
#include "kernels/grouped_conv.h"
#include "kernels/integer_conv.h"
#include "kernels/problem.h"
#include "kernels/tap_conv.h"

namespace quantal::kernels {
namespace {

constexpr Isa kIsas[] = {Isa::kPortable,   Isa::kAvx2,       Isa::kAvxVnni,    Isa::kAvx512,
                         Isa::kAvx512Vnni, Isa::kAvx512Vbmi, Isa::kAvx512Bf16, Isa::kNeon};

ConvShape square(std::int64_t channels, std::int64_t size, std::int64_t rows, std::int64_t kernel,
                 std::int64_t groups = 1, std::int64_t batch = 1) {
  return {.batch = batch,
          .channels = channels,
          .rows = rows,
          .groups = groups,
          .input = {1, size, size},
          .kernel = {1, kernel, kernel},
          .padding = {0, kernel / 2, kernel / 2}};
}

std::vector<ConvShape> shapes() {
  std::vector<ConvShape> all;
  for (const std::int64_t size : {1, 2, 7, 14, 56, 224}) {
    for (const std::int64_t kernel : {1, 3, 7}) {
      for (const std::int64_t batch : {1, 8}) {
        for (const std::int64_t channels : {3, 16, 64, 512}) {
          for (const std::int64_t rows : {10, 64, 1024}) {
            all.push_back(square(channels, size, rows, kernel, 1, batch));
          }
        }
        for (const std::int64_t width : {1, 2, 3, 8, 16, 24, 32}) {
          all.push_back(square(12 * width, size, 12 * width, kernel, 12, batch));
          all.push_back(square(12 * width, size, 36 * width, kernel, 12, batch));
        }
      }
    }
  }
  return all;
}

std::string name_of(Isa isa, const ConvShape& s) {
  return std::string(isa_name(isa)) + " " + std::to_string(s.batch) + " x " +
         std::to_string(s.channels) + " at " + std::to_string(s.input[2]) + " to " +
         std::to_string(s.rows) + " by " + std::to_string(s.kernel[2]) + " in " +
         std::to_string(s.groups);
}

// Kernels are only looked up, so that this holds for processors beyond the one it runs on.
TEST(ConvWay, is_one_that_the_instruction_set_has_for_the_shape) {
  for (const Isa isa : kIsas) {
    for (const ConvShape& shape : shapes()) {
      for (const ChannelOrder order : {ChannelOrder::kPlanes, ChannelOrder::kLast}) {
        for (const FloatType type : kFloatTypes) {
          switch (conv_way(isa, shape, order, type)) {
            case ConvWay::kDirect:
              EXPECT_TRUE(find_float_conv(isa) != nullptr && takes_groups(shape))
                  << name_of(isa, shape);
              break;
            case ConvWay::kGrouped:
              EXPECT_NE(find_grouped_conv(isa, shape, order), nullptr) << name_of(isa, shape);
              break;
            case ConvWay::kPatches:
              EXPECT_EQ(shape.groups, 1) << name_of(isa, shape);
              break;
            case ConvWay::kAten:
              break;
          }
        }
      }
    }
  }
}

#if defined(__x86_64__)

// Layers whose way is far from the next best one.
TEST(ConvWay, reads_codes_where_they_lie_where_dequantizing_takes_long) {
  for (const Isa isa : {Isa::kAvx2, Isa::kAvxVnni, Isa::kAvx512, Isa::kAvx512Vbmi}) {
    const auto way = [&](const ConvShape& shape, ChannelOrder order = ChannelOrder::kPlanes) {
      return conv_way(isa, shape, order, FloatType::kF32);
    };
    EXPECT_EQ(way(square(512, 7, 512, 3)), ConvWay::kDirect) << isa_name(isa);
    EXPECT_EQ(way(square(512, 7, 512, 3), ChannelOrder::kLast), ConvWay::kDirect) << isa_name(isa);
    EXPECT_EQ(way(square(8, 4, 8, 3)), ConvWay::kDirect) << isa_name(isa);
    EXPECT_EQ(way(square(512, 1, 128, 1)), ConvWay::kPatches) << isa_name(isa);
    EXPECT_EQ(way(square(144, 56, 144, 3, 144)), ConvWay::kGrouped) << isa_name(isa);
    EXPECT_EQ(way(square(64, 56, 64, 3, 1, 8)), ConvWay::kAten) << isa_name(isa);
  }
}

// bf16, beside torch's.
TEST(ConvWay, asks_how_fast_products_of_16_bits_are) {
  const ConvShape large = square(64, 56, 64, 3, 1, 8);
  const auto way = [&](Isa isa, FloatType type) {
    return conv_way(isa, large, ChannelOrder::kPlanes, type);
  };
  EXPECT_EQ(way(Isa::kAvx512Vbmi, FloatType::kF16), ConvWay::kDirect);
  EXPECT_EQ(way(Isa::kAvx512Vbmi, FloatType::kBF16) == ConvWay::kDirect, !multiplies_bf16_fast());
  EXPECT_EQ(way(Isa::kAvx512Bf16, FloatType::kBF16), ConvWay::kAten);
}

PackedLayout layout_of(const ConvShape& shape, QTypeId qtype, std::int64_t group_size = 0) {
  return PackedLayout({qtype, shape.rows, shape.columns(), group_size, FloatType::kF32});
}

constexpr Isa kTapIsas[] = {Isa::kAvx2, Isa::kAvxVnni, Isa::kAvx512, Isa::kAvx512Vnni, Isa::kAmx};

TEST(ConvWay, dense_int8_convolutions_write_no_patches) {
  for (const Isa isa : kTapIsas) {
    for (const ChannelOrder order : {ChannelOrder::kPlanes, ChannelOrder::kLast}) {
      const auto by_taps = [&](const ConvShape& shape, QTypeId qtype = QTypeId::kInt8) {
        return goes_by_taps(isa, shape, layout_of(shape, qtype), order);
      };
      EXPECT_TRUE(by_taps(square(64, 56, 64, 3))) << isa_name(isa);
      EXPECT_TRUE(by_taps(square(128, 28, 128, 3))) << isa_name(isa);
      EXPECT_TRUE(by_taps(square(1024, 7, 1024, 3, 32))) << isa_name(isa);
      EXPECT_FALSE(by_taps(square(144, 56, 144, 3, 144))) << isa_name(isa);
      EXPECT_FALSE(by_taps(square(256, 2, 256, 3))) << isa_name(isa);
      EXPECT_FALSE(by_taps(square(64, 56, 64, 3), QTypeId::kInt4)) << isa_name(isa);
    }
  }
}

TEST(ConvWay, groups_that_share_a_tile_go_by_taps_where_bytes_are_multiplied) {
  const ConvShape shape = square(256, 28, 256, 3, 32);  // groups of 8 by 8
  for (const Isa isa : kTapIsas) {
    const bool multiplies_bytes = isa != Isa::kAvx2 && isa != Isa::kAvx512;
    const PackedLayout layout = layout_of(shape, QTypeId::kInt8);
    EXPECT_EQ(goes_by_taps(isa, shape, layout, ChannelOrder::kLast), multiplies_bytes);
    EXPECT_EQ(goes_by_taps(isa, shape, layout, ChannelOrder::kPlanes), multiplies_bytes);
  }
}

// Python's packs the weight in each call.
TEST(ConvWay, codes_gain_where_products_of_bytes_make_up_for_packing) {
  const auto gains = [](Isa isa, const ConvShape& shape, QTypeId qtype = QTypeId::kInt8) {
    return gains_from_codes(isa, shape, layout_of(shape, qtype));
  };
  for (const Isa isa : kTapIsas) {
    EXPECT_TRUE(gains(isa, square(64, 56, 64, 3))) << isa_name(isa);
    EXPECT_TRUE(gains(isa, square(64, 56, 64, 3), QTypeId::kInt4)) << isa_name(isa);
    EXPECT_TRUE(gains(isa, square(144, 56, 144, 3, 144))) << isa_name(isa);  // depthwise
  }
  for (const Isa isa : {Isa::kAvxVnni, Isa::kAvx512Vnni, Isa::kAmx}) {
    EXPECT_TRUE(gains(isa, square(24, 28, 32, 3))) << isa_name(isa);
  }
}

#endif

}  // namespace
}  // namespace quantal::kernels
