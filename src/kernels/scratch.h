#pragma once

#include <cstddef>
#include <cstdint>

#include <quantal/api.h>

namespace quantal::kernels {

/// Uninitialised fp32 memory, aligned to a cache line. Code for several instruction sets shares it:
/// not a std::vector, and nothing but reading a pointer is inline, since the linker takes any one
/// of the copies of an inline function.
///
/// A thread keeps some MiB that it no longer needs for its next call: memory that is new to the
/// process costs as much as a small product, since the system clears each page of it.
class QUANTAL_API Scratch {
 public:
  /// Null of none.
  explicit Scratch(std::int64_t floats);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* data() const { return data_; }

  static constexpr std::size_t kMostKept = std::size_t{8} << 20;  ///< bytes, of a thread

 private:
  float* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace quantal::kernels
