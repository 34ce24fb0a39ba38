#include "kernels/packed_layout.h"

#include <cstring>
#include <thread>

#include <gtest/gtest.h>

#include "kernels/guarded_bytes.h"
#include "kernels/weights.h"

namespace quantal::kernels {
namespace {

std::vector<WeightSpec> specs() {
  std::vector<WeightSpec> all;
  for (const QTypeId qtype : kAllTypes) {
    const bool is_affine = qtype == QTypeId::kInt2 || qtype == QTypeId::kInt4;
    for (const std::int64_t rows : {1, 2, 3, 15, 16, 17, 33}) {
      for (const std::int64_t columns : {1, 2, 7, 8, 15, 16, 31, 64, 129, 255}) {
        all.push_back({qtype, rows, columns, 0, FloatType::kF32});
        if (!is_affine) continue;
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

TEST(PackedLayout, packing_loses_nothing) {
  for (const WeightSpec& spec : specs()) {
    const RandomWeight weight(spec);
    std::vector<std::byte> bytes = weight.packed();
    std::vector<std::uint8_t> data(weight.data.size(), 0xAA);
    std::vector<std::byte> scale(weight.scale.size()), shift(weight.shift.size());
    unpack(PackedLayout(spec), RandomWeight::align(bytes),
           {data.data(), scale.data(), shift.data()}, two_threads);
    const std::string name = type_name(spec.qtype) + " " + std::to_string(spec.rows) + "x" +
                             std::to_string(spec.columns) + " g" + std::to_string(spec.group_size);
    EXPECT_EQ(data, weight.data) << name;
    EXPECT_EQ(scale, weight.scale) << name;
    EXPECT_EQ(shift, weight.shift) << name;
  }
}

TEST(PackedLayout, threads_give_the_same_bytes) {
  for (const WeightSpec& spec : specs()) {
    const RandomWeight weight(spec);
    const PackedLayout layout(spec);
    std::vector<std::byte> one(layout.size() + 64), two(layout.size() + 64);
    pack(layout, weight.canonical(), RandomWeight::align(one));
    pack(layout, weight.canonical(), RandomWeight::align(two), two_threads);
    EXPECT_TRUE(std::equal(RandomWeight::align(one), RandomWeight::align(one) + layout.size(),
                           RandomWeight::align(two)));
  }
}

// Codes end at a page that may not be read.
TEST(PackedLayout, every_isa_packs_the_same_bytes) {
  for (const WeightSpec& spec : specs()) {
    const RandomWeight weight(spec);
    const PackedLayout layout(spec);
    const GuardedBytes data(weight.data.size());
    std::memcpy(data.data(), weight.data.data(), weight.data.size());
    CanonicalWeight canonical = weight.canonical();
    canonical.data = reinterpret_cast<const std::uint8_t*>(data.data());
    std::vector<std::byte> wanted(layout.size() + 64);
    pack(layout, canonical, RandomWeight::align(wanted));
    for (const Isa isa : supported_isas()) {
      std::vector<std::byte> got(wanted.size(), std::byte{0xAA});
      pack(layout, canonical, RandomWeight::align(got), two_threads, isa);
      EXPECT_TRUE(std::equal(RandomWeight::align(got), RandomWeight::align(got) + layout.size(),
                             RandomWeight::align(wanted)))
          << isa_name(isa) << ' ' << type_name(spec.qtype) << ' ' << spec.rows << 'x'
          << spec.columns << " g" << spec.group_size;
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
