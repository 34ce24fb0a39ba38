#include "kernels/packed_layout.h"

#include <thread>

#include <gtest/gtest.h>

#include "kernels/guarded_weight.h"
#include "kernels/sample.h"

namespace quantal::kernels {
namespace {

std::vector<WeightSpec> specs() {
  std::vector<WeightSpec> all;
  for (const QTypeId qtype : kAllTypes) {
    for (const std::int64_t rows : {1, 2, 3, 15, 16, 17, 33}) {
      for (const std::int64_t columns : {1, 2, 7, 8, 15, 16, 31, 64, 129, 255}) {
        all.push_back({qtype, rows, columns, 0, FloatType::kF32});
        if (!is_affine(qtype)) continue;
        for (const std::int64_t group : {8, 24, 32, 300}) {
          all.push_back({qtype, rows, columns, group, FloatType::kBF16});
        }
      }
    }
  }
  return all;
}

void two_threads(std::int64_t count, const std::function<void(std::int64_t, std::int64_t)>& body) {
  std::thread other([&] { body(0, count / 2); });
  body(count / 2, count);
  other.join();
}

std::string name_of(const WeightSpec& spec) {
  return type_name(spec.qtype) + " " + std::to_string(spec.rows) + "x" +
         std::to_string(spec.columns) + " g" + std::to_string(spec.group_size);
}

TEST(PackedLayout, packing_loses_nothing) {
  Sample sample;
  for (const WeightSpec& spec : specs()) {
    if (!sample.takes_next()) continue;
    const RandomWeight weight(spec);
    for (const Edge edge : kEdges) {
      const GuardedPacked packed(weight, edge);
      for (const Isa isa : supported_isas()) {
        const GuardedCanonical canonical(spec, edge);
        unpack(packed.layout, packed.data(), canonical.room(), two_threads, isa);
        EXPECT_TRUE(canonical.equals(weight)) << isa_name(isa) << ' ' << name_of(spec);
      }
    }
  }
}

TEST(PackedLayout, threads_give_the_same_bytes) {
  for (const WeightSpec& spec : specs()) {
    const RandomWeight weight(spec);
    const GuardedPacked one(weight), two(weight);
    std::fill_n(two.bytes.data(), two.bytes.size(), std::byte{0xAA});
    pack(two.layout, weight.canonical(), two.bytes.data(), two_threads);
    EXPECT_TRUE(std::equal(one.data(), one.data() + one.layout.size(), two.data()));
  }
}

// Codes, scales and shifts begin or end at a page that may not be read, and so does the result.
TEST(PackedLayout, every_isa_packs_the_same_bytes) {
  Sample sample;
  for (const WeightSpec& spec : specs()) {
    if (!sample.takes_next()) continue;
    const RandomWeight weight(spec);
    const GuardedPacked wanted(weight);
    for (const Edge edge : kEdges) {
      const GuardedCanonical canonical(weight, edge);
      for (const Isa isa : supported_isas()) {
        const GuardedBytes got(wanted.layout.size(), edge);
        std::fill_n(got.data(), got.size(), std::byte{0xAA});
        pack(wanted.layout, canonical.get(), got.data(), two_threads, isa);
        EXPECT_TRUE(std::equal(got.data(), got.data() + got.size(), wanted.data()))
            << isa_name(isa) << ' ' << name_of(spec);
      }
    }
  }
}

// The drawing in packed_layout.h, byte by byte.
TEST(PackedLayout, a_line_of_int4_has_eight_columns) {
  const WeightSpec spec{QTypeId::kInt4, 2, 8, 0, FloatType::kF32};
  // One canonical row of bytes: row 0 in the low nibbles, row 1 in the high ones.
  const std::vector<std::uint8_t> data = {0xF0, 0xE1, 0xD2, 0xC3, 0xB4, 0xA5, 0x96, 0x87};
  const float scale[] = {1, 2}, shift[] = {3, 4};
  const PackedLayout layout(spec);
  ASSERT_EQ(layout.size(), 64 + 128);
  alignas(64) std::byte packed[192];
  pack(layout, {data.data(), scale, shift}, packed);
  const std::uint8_t wanted[] = {0x40, 0x51, 0x62, 0x73, 0xBF, 0xAE, 0x9D, 0x8C, 0};
  for (int i = 0; i < 9; ++i) EXPECT_EQ(static_cast<int>(packed[i]), wanted[i]) << i;
  EXPECT_EQ(load_float(packed + 64, 1, FloatType::kF32), 2);
  EXPECT_EQ(load_float(packed + 64, 16, FloatType::kF32), 3);
}

TEST(PackedLayout, a_line_of_int2_has_sixteen_columns) {
  const WeightSpec spec{QTypeId::kInt2, 1, 16, 0, FloatType::kF32};
  std::vector<std::uint8_t> data(16);
  for (int i = 0; i < 16; ++i) data[i] = static_cast<std::uint8_t>(i / 4);
  const float scale[] = {1}, shift[] = {0};
  alignas(64) std::byte packed[192];
  pack(PackedLayout(spec), {data.data(), scale, shift}, packed);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(static_cast<int>(packed[i]), 0b11'10'01'00) << i;
}

TEST(PackedLayout, int8_is_stored_unsigned) {
  const WeightSpec spec{QTypeId::kInt8, 1, 3, 0, FloatType::kF32};
  const std::vector<std::uint8_t> data = {0x81, 0, 127};
  const float scale[] = {1};
  alignas(64) std::byte packed[128];
  pack(PackedLayout(spec), {data.data(), scale, nullptr}, packed);
  const int wanted[] = {1, 128, 255, 128};
  for (int i = 0; i < 4; ++i) EXPECT_EQ(static_cast<int>(packed[i]), wanted[i]) << i;
}

TEST(PackedLayout, empty_weights_take_no_codes) {
  EXPECT_EQ(PackedLayout({QTypeId::kInt4, 0, 128, 32, FloatType::kF32}).size(), 0);
  EXPECT_EQ(PackedLayout({QTypeId::kInt8, 16, 0, 0, FloatType::kF32}).size(), 64);
}

}  // namespace
}  // namespace quantal::kernels
