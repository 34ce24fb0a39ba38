#include "kernels/transpose.h"

#include <algorithm>

#include "kernels/transpose_square.h"
#include "kernels/variants.h"

namespace quantal::kernels {
namespace {

template <typename Element>
void transpose_block(const Element* from, std::int64_t from_stride, Element* to,
                     std::int64_t to_stride) {
  using Of = Register<Element>;
  typename Of::Lanes rows[Of::kLanes];
  QUANTAL_UNROLL for (int i = 0; i < Of::kLanes; ++i) rows[i] = Of::load(from + i * from_stride);
  transpose_square<Element>(rows);
  QUANTAL_UNROLL for (int i = 0; i < Of::kLanes; ++i) Of::store(rows[i], to + i * to_stride);
}

}  // namespace

template <typename Element>
void transpose(const Element* from, std::int64_t from_stride, std::int64_t rows,
               std::int64_t columns, Element* to, std::int64_t to_stride) {
  constexpr int kBlock = Register<Element>::kLanes;
  const std::int64_t whole_rows = rows / kBlock * kBlock;
  const std::int64_t whole_columns = columns / kBlock * kBlock;
  for (std::int64_t r = 0; r < whole_rows; r += kBlock) {
    for (std::int64_t c = 0; c < whole_columns; c += kBlock) {
      transpose_block(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
    }
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) {
      to[c * to_stride + r] = from[r * from_stride + c];
    }
  }
}

void gather_pixels(const std::int8_t* from, std::int64_t plane, std::int64_t channels,
                   std::span<std::int8_t* const> to) {
  using Of = Register<std::int8_t>;
  const auto pixels = static_cast<std::int64_t>(to.size());
  if (pixels < Of::kLanes || channels < Of::kLanes) {
    for (std::int64_t p = 0; p < pixels; ++p) {
      for (std::int64_t c = 0; c < channels; ++c) to[p][c] = from[c * plane + p];
    }
    return;
  }
  // The last ones of both, maybe again.
  for (std::int64_t i = 0; i < pixels; i += Of::kLanes) {
    const std::int64_t p = std::min(i, pixels - Of::kLanes);
    for (std::int64_t k = 0; k < channels; k += Of::kLanes) {
      const std::int64_t c = std::min(k, channels - Of::kLanes);
      Of::Lanes rows[Of::kLanes];
      QUANTAL_UNROLL for (int j = 0; j < Of::kLanes; ++j) {
        rows[j] = Of::load(from + (c + j) * plane + p);
      }
      transpose_square<std::int8_t>(rows);
      QUANTAL_UNROLL for (int j = 0; j < Of::kLanes; ++j) Of::store(rows[j], to[p + j] + c);
    }
  }
}

void interleave(const std::int8_t* from, std::int64_t plane, std::int64_t channels,
                std::int64_t pixels, std::int8_t* to) {
  using Of = Register<std::int8_t>;
  // Whole registers are stored: what lies behind the channels of a pixel is written later.
  const std::int64_t last = pixels - (Of::kLanes + channels - 1) / channels;
  std::int64_t p = 0;
  for (; channels <= Of::kLanes && p + Of::kLanes <= last; p += Of::kLanes) {
    Of::Lanes rows[Of::kLanes]{};
    for (std::int64_t c = 0; c < channels; ++c) rows[c] = Of::load(from + c * plane + p);
    transpose_square<std::int8_t>(rows);
    QUANTAL_UNROLL for (int j = 0; j < Of::kLanes; ++j) Of::store(rows[j], to + (p + j) * channels);
  }
  for (; p < pixels; ++p) {
    for (std::int64_t c = 0; c < channels; ++c) to[p * channels + c] = from[c * plane + p];
  }
}

template void transpose(const std::int8_t*, std::int64_t, std::int64_t, std::int64_t, std::int8_t*,
                        std::int64_t);
template void transpose(const std::uint16_t*, std::int64_t, std::int64_t, std::int64_t,
                        std::uint16_t*, std::int64_t);
template void transpose(const float*, std::int64_t, std::int64_t, std::int64_t, float*,
                        std::int64_t);

void transpose_floats(Isa isa, const float* from, std::int64_t from_stride, std::int64_t rows,
                      std::int64_t columns, float* to, std::int64_t to_stride) {
  const auto kernel =
      best_variant<TransposeFloats>(isa, {
#if defined(__x86_64__)
                                             {Isa::kAvx512, {16, transpose_floats__avx512}},
                                             {Isa::kAvx2, {8, transpose_floats__avx2}},
#endif
                                             {Isa::kPortable, {}}});
  const std::int64_t whole_rows = kernel.run == nullptr ? 0 : rows / kernel.rows * kernel.rows;
  const std::int64_t whole_columns = columns / 4 * 4;
  if (whole_rows > 0) kernel.run(from, from_stride, whole_rows, whole_columns, to, to_stride);
  transpose(from + whole_columns, from_stride, whole_rows, columns - whole_columns,
            to + whole_columns * to_stride, to_stride);
  transpose(from + whole_rows * from_stride, from_stride, rows - whole_rows, columns,
            to + whole_rows, to_stride);
}

}  // namespace quantal::kernels
