#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace quantal::kernels {

/// Uninitialised fp32 memory, aligned to a cache line. Not a std::vector: code for several
/// instruction sets shares it, and inline functions must not differ between them.
class Scratch {
 public:
  explicit Scratch(std::int64_t floats)
      : data_(static_cast<float*>(
            ::operator new(static_cast<std::size_t>(floats) * sizeof(float), kAlign))) {}
  ~Scratch() { ::operator delete(data_, kAlign); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlign{64};
  float* data_;
};

}  // namespace quantal::kernels
