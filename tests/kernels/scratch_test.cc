#include "kernels/scratch.h"

#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

namespace quantal::kernels {
namespace {

bool is_aligned(const float* data) { return reinterpret_cast<std::uintptr_t>(data) % 64 == 0; }

TEST(Scratch, is_aligned_and_as_large_as_asked_for) {
  for (const std::int64_t floats : {1, 15, 16, 17, 1000, 1 << 20, 3 << 20}) {
    for (int turn = 0; turn < 3; ++turn) {
      const Scratch scratch(floats);
      ASSERT_TRUE(is_aligned(scratch.data()));
      std::memset(scratch.data(), turn, floats * sizeof(float));
    }
  }
}

TEST(Scratch, of_nothing_has_no_memory) { EXPECT_EQ(Scratch(0).data(), nullptr); }

TEST(Scratch, that_live_at_once_are_apart) {
  // Many, of many sizes: more than a thread keeps afterwards.
  for (int turn = 0; turn < 3; ++turn) {
    std::vector<std::unique_ptr<Scratch>> all;
    for (std::int64_t i = 1; i <= 100; ++i) {
      all.push_back(std::make_unique<Scratch>(i * 997));
      std::memset(all.back()->data(), static_cast<int>(i), i * 997 * sizeof(float));
    }
    for (std::int64_t i = 1; i <= 100; ++i) {
      const auto* bytes = reinterpret_cast<const unsigned char*>(all[i - 1]->data());
      const std::int64_t size = i * 997 * static_cast<std::int64_t>(sizeof(float));
      for (std::int64_t at = 0; at < size; ++at) ASSERT_EQ(bytes[at], i);
    }
  }
}

#if !defined(__SANITIZE_ADDRESS__)
TEST(Scratch, is_kept_for_the_next_one_of_about_its_size) {
  std::thread([] {  // which has kept nothing yet
    const auto address_of = [](std::int64_t floats) { return Scratch(floats).data(); };
    const float* first = address_of(100000);
    EXPECT_EQ(address_of(90000), first);
    EXPECT_EQ(address_of(100000), first);
    const Scratch taken(100000);
    EXPECT_EQ(taken.data(), first);
    EXPECT_NE(address_of(100000), first);
  })
      .join();
}
#endif

}  // namespace
}  // namespace quantal::kernels
