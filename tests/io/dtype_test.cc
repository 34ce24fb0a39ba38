#include <set>

#include <gtest/gtest.h>

#include <quantal/safetensors.h>

namespace quantal::safetensors {
namespace {

TEST(Dtype, names_map_both_ways) {
  std::set<std::string> names;
  for (int i = 0; i < kNumDtypes; ++i) {
    const Dtype dtype = static_cast<Dtype>(i);
    EXPECT_EQ(dtype_from_name(dtype_name(dtype)), dtype);
    names.insert(dtype_name(dtype));
  }
  const std::set<std::string> wanted = {
      "BOOL",    "F4",          "F6_E2M3",     "F6_E3M2", "U8",  "I8",  "F8_E5M2", "F8_E4M3",
      "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I16",     "U16", "F16", "BF16",    "I32",
      "U32",     "F32",         "C64",         "F64",     "I64", "U64"};
  EXPECT_EQ(names, wanted);
  EXPECT_EQ(dtype_from_name("f32"), std::nullopt);
  EXPECT_EQ(dtype_from_name(""), std::nullopt);
}

TEST(Dtype, bits) {
  EXPECT_EQ(dtype_bits(Dtype::kBool), 8);
  EXPECT_EQ(dtype_bits(Dtype::kF4), 4);
  EXPECT_EQ(dtype_bits(Dtype::kF6E2M3), 6);
  EXPECT_EQ(dtype_bits(Dtype::kF6E3M2), 6);
  EXPECT_EQ(dtype_bits(Dtype::kF8E8M0), 8);
  EXPECT_EQ(dtype_bits(Dtype::kBF16), 16);
  EXPECT_EQ(dtype_bits(Dtype::kU32), 32);
  EXPECT_EQ(dtype_bits(Dtype::kC64), 64);
  EXPECT_EQ(dtype_bits(Dtype::kU64), 64);
}

TEST(Status, names_every_error_class) {
  std::set<std::string> names;
  for (int i = 0; i <= static_cast<int>(Errc::kOutOfMemory); ++i) {
    names.insert(errc_name(static_cast<Errc>(i)));
  }
  EXPECT_EQ(names.size(), static_cast<std::size_t>(Errc::kOutOfMemory) + 1);
  EXPECT_FALSE(names.contains("unknown"));
  EXPECT_STREQ(errc_name(Errc::kDuplicateKey), "DuplicateKey");
}

}  // namespace
}  // namespace quantal::safetensors
