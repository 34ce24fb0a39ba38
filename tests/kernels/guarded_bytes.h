#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include <gtest/gtest.h>

namespace quantal::kernels {

/// The end of some data that lies at a page without rights.
enum class Edge : std::uint8_t { kLast, kFirst };
constexpr Edge kEdges[] = {Edge::kLast, Edge::kFirst};

/// Memory between two pages without rights. It ends where one begins (kLast) or begins where one
/// ends (kFirst), or `distance` bytes from there: to read past that end is a fault. The rest of its
/// own pages holds a pattern; a byte of that which changed is a failure of the test.
class GuardedBytes {
 public:
  explicit GuardedBytes(std::int64_t size, Edge edge = Edge::kLast, std::int64_t distance = 0)
      : size_(size) {
    const auto page = static_cast<std::int64_t>(sysconf(_SC_PAGESIZE));
    const std::int64_t inner = (size + distance + page - 1) / page * page;
    mapped_ = inner + 2 * page;
    base_ = static_cast<std::byte*>(
        mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    first_ = base_ + page, last_ = first_ + inner;
    mprotect(first_, inner, PROT_READ | PROT_WRITE);
    data_ = edge == Edge::kLast ? last_ - distance - size : first_ + distance;
    std::memset(first_, kPattern, data_ - first_);
    std::memset(data_ + size, kPattern, last_ - data_ - size);
  }
  ~GuardedBytes() {
    EXPECT_TRUE(is_pattern(first_, data_)) << "wrote before " << size_ << " bytes";
    EXPECT_TRUE(is_pattern(data_ + size_, last_)) << "wrote behind " << size_ << " bytes";
    munmap(base_, mapped_);
  }
  GuardedBytes(const GuardedBytes&) = delete;
  GuardedBytes& operator=(const GuardedBytes&) = delete;

  std::byte* data() const { return data_; }
  std::int64_t size() const { return size_; }
  std::span<const std::byte> span() const { return {data_, static_cast<std::size_t>(size_)}; }

 private:
  static constexpr int kPattern = 0xA5;

  // Each byte equals its neighbour: memcmp takes a page at once.
  static bool is_pattern(const std::byte* begin, const std::byte* end) {
    return begin == end ||
           (*begin == std::byte{kPattern} && std::memcmp(begin, begin + 1, end - begin - 1) == 0);
  }

  std::int64_t size_, mapped_;
  std::byte *base_, *first_, *last_, *data_;
};

}  // namespace quantal::kernels
