#pragma once

#include <cstdint>
#include <span>

#include <quantal/api.h>
#include <quantal/isa.h>

/// Matrices whose rows become columns.
namespace quantal::kernels {

/// (rows, columns) of elements as (columns, rows), each row `from_stride` from the last one.
template <typename Element>
QUANTAL_API void transpose(const Element* from, std::int64_t from_stride, std::int64_t rows,
                           std::int64_t columns, Element* to, std::int64_t to_stride);

/// Pixels of planes, `plane` codes from each other: all channels of the i-th one go to to[i].
QUANTAL_API void gather_pixels(const std::int8_t* from, std::int64_t plane, std::int64_t channels,
                               std::span<std::int8_t* const> to);
/// The same of pixels that follow each other at `to`, for few channels.
QUANTAL_API void interleave(const std::int8_t* from, std::int64_t plane, std::int64_t channels,
                            std::int64_t pixels, std::int8_t* to);

/// transpose() by the instruction set's registers.
QUANTAL_API void transpose_floats(Isa isa, const float* from, std::int64_t from_stride,
                                  std::int64_t rows, std::int64_t columns, float* to,
                                  std::int64_t to_stride);

/// Of multiples of `rows`, and of 4 columns.
struct TransposeFloats {
  int rows = 0;
  void (*run)(const float* from, std::int64_t from_stride, std::int64_t rows, std::int64_t columns,
              float* to, std::int64_t to_stride) = nullptr;
};
void transpose_floats__avx2(const float* from, std::int64_t from_stride, std::int64_t rows,
                            std::int64_t columns, float* to, std::int64_t to_stride);
void transpose_floats__avx512(const float* from, std::int64_t from_stride, std::int64_t rows,
                              std::int64_t columns, float* to, std::int64_t to_stride);

}  // namespace quantal::kernels
