#pragma once

#include <cstddef>
#include <cstdint>

#include <quantal/api.h>

namespace quantal::kernels {

/// Uninitialised fp32 memory, aligned to a cache line. Not a std::vector: code for several
/// instruction sets shares it, and inline functions must not differ between them.
///
/// A thread keeps some MiB that it no longer needs for its next call: memory that is new to the
/// process costs as much as a small product, since the system clears each page of it.
class QUANTAL_API Scratch {
 public:
  explicit Scratch(std::int64_t floats)
      : bytes_(static_cast<std::size_t>(floats) * sizeof(float)), data_(take(bytes_)) {}
  ~Scratch() { give_back(data_, bytes_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* data() const { return data_; }

  static constexpr std::size_t kMostKept = std::size_t{8} << 20;  ///< bytes, of a thread

 private:
  /// At least so many bytes; `bytes` becomes how many they are. Null of none.
  static float* take(std::size_t& bytes);
  static void give_back(float* data, std::size_t bytes);

  std::size_t bytes_;
  float* data_;
};

}  // namespace quantal::kernels
