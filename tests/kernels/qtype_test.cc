#include <quantal/qtype.h>

#include <gtest/gtest.h>

namespace quantal {
namespace {

TEST(QType, is_found_by_its_name) {
  for (const QType& type : all_qtypes()) {
    ASSERT_TRUE(find_qtype(type.name)) << type.name;
    EXPECT_EQ(find_qtype(type.name)->id, type.id);
  }
}

TEST(QType, qfloat8_is_e4m3fn) {
  ASSERT_TRUE(find_qtype("qfloat8"));
  EXPECT_EQ(*find_qtype("qfloat8"), qfloat8_e4m3fn);
}

TEST(QType, other_names_are_none) {
  for (const char* name : {"", "int8", "QINT8", "qint8 ", "qfloat8_e4m3"}) {
    EXPECT_FALSE(find_qtype(name)) << name;
  }
}

TEST(QType, narrow_types_are_affine) {
  for (const QType& type : all_qtypes()) EXPECT_EQ(type.is_affine(), type.bits < 8) << type.name;
}

TEST(QType, ranges_are_those_of_the_formats) {
  EXPECT_EQ(qint8.qmax, 127);
  EXPECT_EQ(qint4.qmax - qint4.qmin, 15);
  EXPECT_EQ(qint2.qmax - qint2.qmin, 3);
  EXPECT_EQ(qfloat8_e4m3fn.qmax, 448);
  EXPECT_EQ(qfloat8_e4m3fnuz.qmax, 240);
  EXPECT_EQ(qfloat8_e5m2.qmax, 57344);
}

}  // namespace
}  // namespace quantal
