#include <quantal/isa.h>

#include <algorithm>
#include <cstdlib>
#include <sstream>

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
  std::vector<Isa> isas = supported_isas();
  // The only one that some processors run slower than what it has a part of.
  const auto vbmi = std::ranges::find(isas, Isa::kAvx512Vbmi);
  if (vbmi != isas.end() && vbmi[1] == Isa::kAvx512Bf16) std::iter_swap(vbmi, vbmi + 1);
  for (std::size_t i = 1; i < isas.size(); ++i) EXPECT_GT(isas[i - 1], isas[i]);
}

TEST(Isa, one_of_another_processor_is_an_error) {
  for (const char* name : {"avx2", "neon", "neon_dotprod", "neon_i8mm", "neon_bf16"}) {
    const bool is_supported =
        std::ranges::any_of(supported_isas(), [&](Isa isa) { return isa_name(isa) == name; });
    const auto choice = choose_isa(name);
    ASSERT_EQ(choice.ok(), is_supported) << name;
    if (is_supported) continue;
    EXPECT_EQ(choice.status().code(), Errc::kInvalidArgument);
    EXPECT_THAT(choice.status().message(), HasSubstr("cannot run"));
  }
}

TEST(Isa, those_of_x86_and_arm_are_never_listed_together) {
#if defined(__aarch64__)
  EXPECT_FALSE(choose_isa("avx2").ok());
  EXPECT_TRUE(choose_isa("neon").ok());
#else
  EXPECT_FALSE(choose_isa("neon").ok());
#endif
}

// scripts/aarch64.sh emulates processors of which it knows what they have.
TEST(Isa, those_of_an_emulated_processor_are_found) {
  const char* wanted = std::getenv("QUANTAL_TEST_ISAS");
  if (wanted == nullptr) GTEST_SKIP() << "QUANTAL_TEST_ISAS says nothing";
  std::ostringstream found;
  for (const Isa isa : supported_isas()) found << (found.tellp() > 0 ? " " : "") << isa_name(isa);
  EXPECT_EQ(found.str(), wanted);
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
