// Convolution in groups of few channels for AVX2 with FMA.
#include "kernels/grouped_conv.h"

#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "kernels/cpu/avx2/grouped_sums.h"

namespace quantal::kernels {
namespace {

using Run = GroupedConvPlan::Run;

std::int64_t column_count(const GroupedConvBlock& block) {
  return static_cast<std::int64_t>(block.plan.columns().size());
}

/// codes[index, index + count) as fp32.
void load_codes(const void* codes, std::int64_t index, std::int64_t count, FloatType, float* to) {
  const std::int8_t* from = static_cast<const std::int8_t*>(codes) + index;
  if (count < kHalfRows) {
    std::copy_n(from, count, to);
    return;
  }
  for (std::int64_t i = 0; i < count; i += kHalfRows) {
    const std::int64_t at = std::min(i, count - kHalfRows);
    _mm256_storeu_ps(to + at, load_codes(from + at));
  }
}

/// Sums of some rows at the positions of some runs, finished and `plane` apart. A run's go to its
/// position, or 8 after those of the run before.
template <int rows, int runs, bool at_position, bool is_affine>
inline void sum_planes(const GroupedConvBlock& block, std::int64_t row, const Run* run, float* to,
                       std::int64_t plane) {
  const std::int64_t columns = column_count(block);
  const std::int64_t* const offsets = block.plan.columns().data();
  const float* begins[runs];
  QUANTAL_UNROLL for (int i = 0; i < runs; ++i) begins[i] = block.input + run[i].begin;
  const float* weight = block.rows.weight + row * columns;
  __m256 sums[rows][runs], x_sums[runs];
  QUANTAL_UNROLL for (int i = 0; i < runs; ++i) {
    x_sums[i] = _mm256_setzero_ps();
    QUANTAL_UNROLL for (int r = 0; r < rows; ++r) sums[r][i] = _mm256_setzero_ps();
  }
  for (std::int64_t c = 0; c < columns; ++c) {
    __m256 x[runs];
    QUANTAL_UNROLL for (int i = 0; i < runs; ++i) {
      x[i] = _mm256_loadu_ps(begins[i] + offsets[c]);
      if constexpr (is_affine) x_sums[i] = _mm256_add_ps(x_sums[i], x[i]);
    }
    QUANTAL_UNROLL for (int r = 0; r < rows; ++r) {
      const __m256 factor = _mm256_broadcast_ss(weight + r * columns + c);
      QUANTAL_UNROLL for (int i = 0; i < runs; ++i) {
        sums[r][i] = _mm256_fmadd_ps(x[i], factor, sums[r][i]);
      }
    }
  }
  const __m256 x_scale = _mm256_set1_ps(block.x_scale);
  QUANTAL_UNROLL for (int r = 0; r < rows; ++r) {
    const RowFactors factors{
        _mm256_broadcast_ss(block.rows.scale + row + r),
        is_affine ? _mm256_broadcast_ss(block.rows.shift + row + r) : _mm256_setzero_ps(),
        _mm256_broadcast_ss(block.rows.bias + row + r)};
    QUANTAL_UNROLL for (int i = 0; i < runs; ++i) {
      const std::int64_t at = at_position ? run[i].position : i * kHalfRows;
      _mm256_storeu_ps(to + r * plane + at,
                       factors.finish<is_affine>(sums[r][i], x_sums[i], x_scale));
    }
  }
}

template <int rows, int runs, bool is_affine>
void plane_tile(const GroupedConvBlock& block, std::int64_t row, std::int64_t first) {
  const Run* const run = block.plan.runs() + first;
  const std::int64_t to = block.begin + row * block.row_step;
  row += block.at.row;
  const FloatType type = block.args.type;
  if (type == FloatType::kF32 && run->count == kHalfRows) {
    return sum_planes<rows, runs, true, is_affine>(
        block, row, run, static_cast<float*>(block.y) + to, block.row_step);
  }
  float sums[rows * runs * kHalfRows];
  sum_planes<rows, runs, false, is_affine>(block, row, run, sums, runs * kHalfRows);
  for (int i = 0; i < rows * runs; ++i) {
    store_rows(block.y, to + i / runs * block.row_step + run[i % runs].position, type,
               run[i % runs].count, _mm256_loadu_ps(sums + i * kHalfRows));
  }
}

template <int rows, int runs, bool is_affine>
void plane_tiles(const GroupedConvBlock& block, std::int64_t row, std::int64_t first = 0) {
  const std::int64_t count = block.plan.runs_of(block.at);
  for (; first + runs <= count; first += runs) {
    plane_tile<rows, runs, is_affine>(block, row, first);
  }
  if constexpr (runs > 1)
    plane_tiles<rows, (runs == 3 ? 2 : runs / 2), is_affine>(block, row, first);
}

template <bool is_affine>
void planes_of(const GroupedConvBlock& block) {
  const std::int64_t rows = block.at.rows;
  // Sums of x take registers, too.
  constexpr int kFew = is_affine ? 2 : 1;
  std::int64_t row = 0;
  for (; row + 4 <= rows; row += 4) plane_tiles<4, 4 - kFew, is_affine>(block, row);
  for (; row + 2 <= rows; row += 2) plane_tiles<2, 4 / kFew, is_affine>(block, row);
  if (row < rows) plane_tiles<1, 8 / kFew, is_affine>(block, row);
}

void planes(const GroupedConvBlock& block) {
  if (block.rows.shift != nullptr) return planes_of<true>(block);
  planes_of<false>(block);
}

/// Positions of a run that are computed together: as many as leave registers for their numbers.
template <int halves, bool is_affine>
constexpr int kPositions = halves == 2 ? 4 : kTogether<is_affine>;

/// Sums of rows [row, row + 8 halves) at positions of a run from `first` on, finished and `stride`
/// apart. `indices`: of the channels that they read among those from the first one's on; `is_one`:
/// they read the same. Not inline: the caller's numbers would push pointers out of registers.
template <int halves, bool is_one, bool is_affine>
[[gnu::noinline]] void sum_pixels(const GroupedConvBlock& block, std::int64_t row, const Run& run,
                                  std::int64_t first, __m256i indices, float* to,
                                  std::int64_t stride) {
  constexpr int kCount = kPositions<halves, is_affine>;
  const ConvShape& shape = block.args.shape;
  const std::int64_t columns = column_count(block), step = block.plan.position_step();
  const std::int64_t* const offsets = block.plan.columns().data();
  const float* const begin =
      block.input + run.begin + row / shape.group_rows() * shape.group_channels();
  const float* begins[kCount];
  QUANTAL_UNROLL for (int i = 0; i < kCount; ++i) {
    begins[i] = begin + std::min(first + i, run.count - 1) * step;
  }
  const float* const weight = block.rows.weight + row * columns;
  __m256 sums[halves][kCount], x_sums[kCount];
  QUANTAL_UNROLL for (int i = 0; i < kCount; ++i) {
    x_sums[i] = _mm256_setzero_ps();
    QUANTAL_UNROLL for (int h = 0; h < halves; ++h) sums[h][i] = _mm256_setzero_ps();
  }
  for (std::int64_t c = 0; c < columns; ++c) {
    __m256 factors[halves];
    QUANTAL_UNROLL for (int h = 0; h < halves; ++h) {
      factors[h] = _mm256_load_ps(weight + (h * columns + c) * kHalfRows);
    }
    QUANTAL_UNROLL for (int i = 0; i < kCount; ++i) {
      const float* const from = begins[i] + offsets[c];
      const __m256 x = is_one ? _mm256_broadcast_ss(from)
                              : _mm256_permutevar8x32_ps(_mm256_loadu_ps(from), indices);
      if constexpr (is_affine) x_sums[i] = _mm256_add_ps(x_sums[i], x);
      QUANTAL_UNROLL for (int h = 0; h < halves; ++h) {
        sums[h][i] = _mm256_fmadd_ps(x, factors[h], sums[h][i]);
      }
    }
  }
  const __m256 x_scale = _mm256_set1_ps(block.x_scale);
  QUANTAL_UNROLL for (int h = 0; h < halves; ++h) {
    const std::int64_t r = row + h * kHalfRows;
    const RowFactors factors{_mm256_load_ps(block.rows.scale + r),
                             is_affine ? _mm256_load_ps(block.rows.shift + r) : _mm256_setzero_ps(),
                             _mm256_load_ps(block.rows.bias + r)};
    QUANTAL_UNROLL for (int i = 0; i < kCount; ++i) {
      _mm256_storeu_ps(to + i * stride + h * kHalfRows,
                       factors.finish<is_affine>(sums[h][i], x_sums[i], x_scale));
    }
  }
}

template <int halves, bool is_one, bool is_affine>
void pixel_tile(const GroupedConvBlock& block, std::int64_t row, const Run& run, std::int64_t first,
                __m256i indices) {
  constexpr int kCount = kPositions<halves, is_affine>, kRows = halves * kHalfRows;
  const std::int64_t rows = std::min<std::int64_t>(kRows, block.args.shape.rows - row);
  const std::int64_t to =
      block.begin + (run.position + first) * block.position_step + row - block.at.row;
  const FloatType type = block.args.type;
  if (type == FloatType::kF32 && first + kCount <= run.count && rows == kRows) {
    return sum_pixels<halves, is_one, is_affine>(
        block, row, run, first, indices, static_cast<float*>(block.y) + to, block.position_step);
  }
  float sums[kCount * kRows];
  sum_pixels<halves, is_one, is_affine>(block, row, run, first, indices, sums, kRows);
  const std::int64_t count = std::min<std::int64_t>(kCount, run.count - first);
  for (std::int64_t i = 0; i < count; ++i) {
    for (std::int64_t r = 0; r < rows; r += kHalfRows) {
      store_rows(block.y, to + i * block.position_step + r, type, rows - r,
                 _mm256_loadu_ps(sums + i * kRows + r));
    }
  }
}

/// Rows [row, end) at all positions, 8 halves at a time.
template <int halves, bool is_one, bool is_affine>
void pixel_tiles(const GroupedConvBlock& block, std::int64_t row, std::int64_t end,
                 __m256i indices) {
  const Run* const last = block.plan.runs() + block.plan.runs_of(block.at);
  for (const Run* run = block.plan.runs(); run < last; ++run) {
    for (std::int64_t r = row; r < end; r += halves * kHalfRows) {
      for (std::int64_t i = 0; i < run->count; i += kPositions<halves, is_affine>) {
        pixel_tile<halves, is_one, is_affine>(block, r, *run, i, indices);
      }
    }
  }
}

template <bool is_affine>
void pixels_of(const GroupedConvBlock& block) {
  const ConvShape& shape = block.args.shape;
  const std::int64_t group_rows = shape.group_rows(), last = block.at.row + block.at.rows;
  constexpr std::int64_t kPair = 2 * kHalfRows;
  if (group_rows % kHalfRows == 0) {
    for (std::int64_t row = block.at.row; row < last;) {
      const bool is_pair = row % group_rows + kPair <= group_rows;
      const std::int64_t end = row + (is_pair ? kPair : kHalfRows);
      is_pair ? pixel_tiles<2, true, is_affine>(block, row, end, _mm256_setzero_si256())
              : pixel_tiles<1, true, is_affine>(block, row, end, _mm256_setzero_si256());
      row = end;
    }
    return;
  }
  std::int32_t channels[kHalfRows];
  for (std::int64_t i = 0; i < kHalfRows; ++i) {
    channels[i] = static_cast<std::int32_t>(i / group_rows * shape.group_channels());
  }
  const __m256i indices = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(channels));
  // The rows of a cache line, whose channels stay in the first-level cache.
  for (std::int64_t row = block.at.row; row < last; row += kPair) {
    pixel_tiles<1, false, is_affine>(block, row, std::min(row + kPair, last), indices);
  }
}

void pixels(const GroupedConvBlock& block) {
  if (block.rows.shift != nullptr) return pixels_of<true>(block);
  pixels_of<false>(block);
}

}  // namespace

const GroupedConvKernel grouped_conv__avx2 = {
    .floats = {load_floats, gather_floats__avx2},
    .codes = {load_codes, gather_codes__avx2},
    .run = {planes, pixels, run_channels__avx2},
    .line = depthwise_line__avx2,
};

}  // namespace quantal::kernels

#pragma GCC pop_options
