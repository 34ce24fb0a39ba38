#include <quantal/isa.h>

#include <gmock/gmock.h>

namespace quantal {
namespace {

using testing::HasSubstr;

TEST(Isa, portable_is_always_there_and_last) {
  ASSERT_FALSE(supported_isas().empty());
  EXPECT_EQ(supported_isas().back(), Isa::kPortable);
}

TEST(Isa, the_best_is_chosen_unless_one_is_named) {
  EXPECT_EQ(choose_isa(nullptr).value(), supported_isas().front());
  EXPECT_EQ(choose_isa("").value(), supported_isas().front());
  for (const Isa isa : supported_isas()) {
    EXPECT_EQ(choose_isa(std::string(isa_name(isa)).c_str()).value(), isa);
  }
}

TEST(Isa, the_best_is_first) {
  for (std::size_t i = 1; i < supported_isas().size(); ++i) {
    EXPECT_GT(supported_isas()[i - 1], supported_isas()[i]);
  }
}

TEST(Isa, an_unknown_name_is_an_error_that_lists_the_known_ones) {
  const auto choice = choose_isa("avx9");
  ASSERT_FALSE(choice.ok());
  EXPECT_EQ(choice.status().code(), Errc::kInvalidArgument);
  EXPECT_THAT(choice.status().message(), HasSubstr("avx9"));
  EXPECT_THAT(choice.status().message(), HasSubstr("portable"));
}

}  // namespace
}  // namespace quantal
