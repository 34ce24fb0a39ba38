#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>

namespace quantal::kernels {

/// Memory that ends where a page without rights begins: reading past the end is a fault.
class GuardedBytes {
 public:
  explicit GuardedBytes(std::int64_t size) {
    const auto page = static_cast<std::int64_t>(sysconf(_SC_PAGESIZE));
    size_ = (size + page - 1) / page * page + 2 * page;
    base_ = static_cast<std::byte*>(
        mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_, page, PROT_NONE);
    mprotect(base_ + size_ - page, page, PROT_NONE);
    data_ = base_ + size_ - page - size;
  }
  ~GuardedBytes() { munmap(base_, size_); }
  GuardedBytes(const GuardedBytes&) = delete;
  GuardedBytes& operator=(const GuardedBytes&) = delete;

  std::byte* data() const { return data_; }

 private:
  std::byte* base_;
  std::byte* data_;
  std::int64_t size_;
};

}  // namespace quantal::kernels
