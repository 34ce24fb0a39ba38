// Convolution in groups of few channels for AVX2 with FMA.
#include "kernels/grouped_conv.h"

#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "kernels/cpu/avx2/rows.h"

namespace quantal::kernels {
namespace {

using Run = GroupedConvPlan::Run;

std::int64_t column_count(const GroupedConvBlock& block) {
  return static_cast<std::int64_t>(block.plan.columns().size());
}

/// Sums of some rows at the positions of some runs, with the bias, `row_stride` apart. A run's go
/// to its position, or 8 after those of the run before.
template <int rows, int runs, bool at_position>
inline void sum_planes(const GroupedConvBlock& block, std::int64_t row, const Run* run, float* to,
                       std::int64_t row_stride) {
  const std::int64_t columns = column_count(block);
  const std::int64_t* const offsets = block.plan.columns().data();
  const float* begins[runs];
  QUANTAL_UNROLL for (int i = 0; i < runs; ++i) begins[i] = block.input + run[i].begin;
  const float* weight = block.weight + row * columns;
  __m256 sums[rows][runs];
  QUANTAL_UNROLL for (int r = 0; r < rows; ++r) {
    QUANTAL_UNROLL for (int i = 0; i < runs; ++i) sums[r][i] = _mm256_setzero_ps();
  }
  for (std::int64_t c = 0; c < columns; ++c) {
    __m256 x[runs];
    QUANTAL_UNROLL for (int i = 0; i < runs; ++i) x[i] = _mm256_loadu_ps(begins[i] + offsets[c]);
    QUANTAL_UNROLL for (int r = 0; r < rows; ++r) {
      const __m256 factor = _mm256_broadcast_ss(weight + r * columns + c);
      QUANTAL_UNROLL for (int i = 0; i < runs; ++i) {
        sums[r][i] = _mm256_fmadd_ps(x[i], factor, sums[r][i]);
      }
    }
  }
  QUANTAL_UNROLL for (int r = 0; r < rows; ++r) {
    const __m256 added = _mm256_broadcast_ss(block.bias + row + r);
    QUANTAL_UNROLL for (int i = 0; i < runs; ++i) {
      const std::int64_t at = at_position ? run[i].position : i * kHalfRows;
      _mm256_storeu_ps(to + r * row_stride + at, _mm256_add_ps(sums[r][i], added));
    }
  }
}

template <int rows, int runs>
void plane_tile(const GroupedConvBlock& block, std::int64_t row, std::int64_t first) {
  const GroupedConvArgs& args = block.args;
  const ConvShape::Extent& size = block.plan.output();
  const Run* const run = block.plan.runs() + first;
  row += block.at.group * args.shape.group_rows();
  const std::int64_t line = block.at.depth * size[1] + block.at.line;
  const std::int64_t plane = size[0] * size[1] * size[2];
  const std::int64_t to = (block.at.sample * args.shape.rows + row) * plane + line * size[2];
  if (args.type == FloatType::kF32 && run->count == kHalfRows) {
    return sum_planes<rows, runs, true>(block, row, run, static_cast<float*>(args.y) + to, plane);
  }
  float sums[rows * runs * kHalfRows];
  sum_planes<rows, runs, false>(block, row, run, sums, runs * kHalfRows);
  for (int i = 0; i < rows * runs; ++i) {
    store_rows(args.y, to + i / runs * plane + run[i % runs].position, args.type,
               run[i % runs].count, _mm256_loadu_ps(sums + i * kHalfRows));
  }
}

template <int rows, int runs>
void plane_tiles(const GroupedConvBlock& block, std::int64_t row, std::int64_t first = 0) {
  const std::int64_t count = block.plan.runs_of(block.at);
  for (; first + runs <= count; first += runs) plane_tile<rows, runs>(block, row, first);
  if constexpr (runs > 1) plane_tiles<rows, runs / 2>(block, row, first);
}

void planes(const GroupedConvBlock& block) {
  const std::int64_t rows = block.args.shape.group_rows();
  std::int64_t row = 0;
  for (; row + 4 <= rows; row += 4) plane_tiles<4, 2>(block, row);
  for (; row + 2 <= rows; row += 2) plane_tiles<2, 4>(block, row);
  if (row < rows) plane_tiles<1, 8>(block, row);
}

/// Sums of rows [row, row + 8) at the positions of a run, with the bias, `stride` apart. `indices`:
/// of the channels that they read among those from the first one's on.
template <bool is_permuted>
inline void sum_pixels(const GroupedConvBlock& block, std::int64_t row, const Run& run,
                       __m256i indices, float* to, std::int64_t stride) {
  const ConvShape& shape = block.args.shape;
  const std::int64_t columns = column_count(block), step = block.plan.position_step();
  const std::int64_t* const offsets = block.plan.columns().data();
  const float* const begin =
      block.input + run.begin + row / shape.group_rows() * shape.group_channels();
  const float* begins[kHalfRows];
  QUANTAL_UNROLL for (int i = 0; i < kHalfRows; ++i) {
    begins[i] = begin + std::min<std::int64_t>(i, run.count - 1) * step;
  }
  const float* weight = block.weight + row * columns;
  __m256 sums[kHalfRows];
  QUANTAL_UNROLL for (int i = 0; i < kHalfRows; ++i) sums[i] = _mm256_setzero_ps();
  for (std::int64_t c = 0; c < columns; ++c) {
    const __m256 factors = _mm256_load_ps(weight + c * kHalfRows);
    QUANTAL_UNROLL for (int i = 0; i < kHalfRows; ++i) {
      __m256 x = _mm256_loadu_ps(begins[i] + offsets[c]);
      if constexpr (is_permuted) x = _mm256_permutevar8x32_ps(x, indices);
      sums[i] = _mm256_fmadd_ps(x, factors, sums[i]);
    }
  }
  const __m256 bias = _mm256_load_ps(block.bias + row);
  QUANTAL_UNROLL for (int i = 0; i < kHalfRows; ++i) {
    _mm256_storeu_ps(to + i * stride, _mm256_add_ps(sums[i], bias));
  }
}

template <bool is_permuted>
void pixel_tile(const GroupedConvBlock& block, std::int64_t row, const Run& run, __m256i indices) {
  const GroupedConvArgs& args = block.args;
  const ConvShape::Extent& size = block.plan.output();
  const std::int64_t line = (block.at.sample * size[0] + block.at.depth) * size[1] + block.at.line;
  const std::int64_t rows = args.shape.rows;
  const std::int64_t to = (line * size[2] + run.position) * rows + row;
  if (args.type == FloatType::kF32 && run.count == kHalfRows && row + kHalfRows <= rows) {
    return sum_pixels<is_permuted>(block, row, run, indices, static_cast<float*>(args.y) + to,
                                   rows);
  }
  float sums[kHalfRows * kHalfRows];
  sum_pixels<is_permuted>(block, row, run, indices, sums, kHalfRows);
  for (std::int64_t i = 0; i < run.count; ++i) {
    store_rows(args.y, to + i * rows, args.type, rows - row, _mm256_loadu_ps(sums + i * kHalfRows));
  }
}

template <bool is_permuted>
void pixel_tiles(const GroupedConvBlock& block) {
  const ConvShape& shape = block.args.shape;
  std::int32_t channels[kHalfRows];
  for (std::int64_t i = 0; i < kHalfRows; ++i) {
    channels[i] = static_cast<std::int32_t>(i / shape.group_rows() * shape.group_channels());
  }
  const __m256i indices = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(channels));
  const Run* const end = block.plan.runs() + block.plan.runs_of(block.at);
  // The rows of a cache line, whose channels stay in the first-level cache.
  for (std::int64_t first = 0; first < shape.rows; first += 2 * kHalfRows) {
    const std::int64_t last = std::min(first + 2 * kHalfRows, shape.rows);
    for (const Run* run = block.plan.runs(); run < end; ++run) {
      for (std::int64_t row = first; row < last; row += kHalfRows) {
        pixel_tile<is_permuted>(block, row, *run, indices);
      }
    }
  }
}

void pixels(const GroupedConvBlock& block) {
  const ConvShape& shape = block.args.shape;
  if (shape.group_rows() == 1) return pixel_tiles<false>(block);
  pixel_tiles<true>(block);
}

}  // namespace

const GroupedConvKernel grouped_conv__avx2 = {load_floats, planes, pixels};

}  // namespace quantal::kernels

#pragma GCC pop_options
