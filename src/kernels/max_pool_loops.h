#pragma once

// Plain loops that compilers turn into the byte maxima of the instruction set that the including
// file is compiled for.

#include <cstdint>

namespace quantal::kernels {
namespace {

inline void raise_to(const std::int8_t* __restrict row, std::int64_t width,
                     std::int8_t* __restrict y) {
  for (std::int64_t i = 0; i < width; ++i) y[i] = y[i] > row[i] ? y[i] : row[i];
}

// Of strides that are known, a loop over constant distances.
template <std::int64_t known_stride>
void reduce_line(const std::int8_t* __restrict line, std::int64_t taps, std::int64_t stride,
                 std::int64_t count, std::int8_t* __restrict y) {
  const std::int64_t step = known_stride != 0 ? known_stride : stride;
  for (std::int64_t i = 0; i < count; ++i) y[i] = line[i * step];
  for (std::int64_t tap = 1; tap < taps; ++tap) {
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int8_t value = line[i * step + tap];
      y[i] = y[i] > value ? y[i] : value;
    }
  }
}

inline void reduce_to(const std::int8_t* line, std::int64_t taps, std::int64_t stride,
                      std::int64_t count, std::int8_t* y) {
  switch (stride) {
    case 1:
      return reduce_line<1>(line, taps, stride, count, y);
    case 2:
      return reduce_line<2>(line, taps, stride, count, y);
    default:
      return reduce_line<0>(line, taps, stride, count, y);
  }
}

}  // namespace
}  // namespace quantal::kernels
