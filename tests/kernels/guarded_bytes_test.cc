#include "kernels/guarded_bytes.h"

#include <algorithm>

#include <gtest/gtest-spi.h>

namespace quantal::kernels {
namespace {

const auto kPage = static_cast<std::int64_t>(sysconf(_SC_PAGESIZE));

// Writes the byte `at` bytes behind the first of ten.
void write(Edge edge, std::int64_t distance, std::int64_t at) {
  const GuardedBytes bytes(10, edge, distance);
  bytes.data()[at] = std::byte{1};
}

TEST(GuardedBytes, may_be_written_all_over) {
  for (const Edge edge : kEdges) {
    for (const std::int64_t size :
         {std::int64_t{0}, std::int64_t{1}, kPage - 1, kPage, kPage + 1}) {
      for (const std::int64_t distance : {0, 1, 64}) {
        const GuardedBytes bytes(size, edge, distance);
        std::fill_n(bytes.data(), size, std::byte{1});
      }
    }
  }
}

TEST(GuardedBytes, tell_who_writes_before_and_behind_them) {
  EXPECT_NONFATAL_FAILURE(write(Edge::kLast, 0, -1), "wrote before 10 bytes");
  EXPECT_NONFATAL_FAILURE(write(Edge::kLast, 0, 10 - kPage), "wrote before 10 bytes");
  EXPECT_NONFATAL_FAILURE(write(Edge::kFirst, 0, 10), "wrote behind 10 bytes");
  EXPECT_NONFATAL_FAILURE(write(Edge::kFirst, 0, kPage - 1), "wrote behind 10 bytes");
  EXPECT_NONFATAL_FAILURE(write(Edge::kLast, 3, 12), "wrote behind 10 bytes");
  EXPECT_NONFATAL_FAILURE(write(Edge::kFirst, 3, -3), "wrote before 10 bytes");
}

TEST(GuardedBytes, lie_where_they_should) {
  const auto address = [](const GuardedBytes& bytes) {
    return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(bytes.data())) % kPage;
  };
  EXPECT_EQ(address(GuardedBytes(10)), kPage - 10);
  EXPECT_EQ(address(GuardedBytes(10, Edge::kLast, 6)), kPage - 16);
  EXPECT_EQ(address(GuardedBytes(10, Edge::kFirst)), 0);
  EXPECT_EQ(address(GuardedBytes(10, Edge::kFirst, 6)), 6);
}

}  // namespace
}  // namespace quantal::kernels
