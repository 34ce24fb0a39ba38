// Depthwise convolution for AVX2 with FMA, 8 channels at a time.
#include "kernels/grouped_conv.h"

#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "kernels/cpu/avx2/grouped_sums.h"

namespace quantal::kernels {
namespace {

using Run = GroupedConvPlan::Run;

struct Floats {
  const void* x;
  FloatType type;
  __m256 load(std::int64_t index) const { return load_rows(x, index, type); }
};

struct Codes {
  const std::int8_t* x;
  __m256 load(std::int64_t index) const { return load_codes(x + index); }
};

/// 8 pixels of 8 planes at a time.
template <typename Numbers>
void gather_planes(const Numbers& x, const ChannelPixels& from, float* to) {
  std::int64_t starts[kHalfRows];
  for (std::int64_t c = 0; c < kHalfRows; ++c) {
    starts[c] = from.first + std::min(c, from.channels - 1) * from.channel_step;
  }
  for (std::int64_t i = 0; i < from.pixels; i += kHalfRows) {
    // Rather some pixels twice than a part of a register.
    const std::int64_t first = std::max<std::int64_t>(0, std::min(i, from.pixels - kHalfRows));
    __m256 values[kHalfRows];
    QUANTAL_UNROLL for (int c = 0; c < kHalfRows; ++c) values[c] = x.load(starts[c] + first);
    transpose(values);
    float* const out = to + first * kHalfRows;
    QUANTAL_UNROLL for (int p = 0; p < kHalfRows; ++p) {
      if (p < from.pixels) _mm256_store_ps(out + p * kHalfRows, values[p]);
    }
  }
}

/// False where registers do not fit what is there.
template <typename Numbers>
bool gather(const Numbers& x, const ChannelPixels& from, float* to) {
  if (from.pixel_step == 1) {
    // A register may read more pixels than there are, but not beyond the last of all.
    const std::int64_t last = from.first + (from.channels - 1) * from.channel_step;
    if (from.pixels < kHalfRows && last + kHalfRows > from.size) return false;
    gather_planes(x, from, to);
    return true;
  }
  if (from.channel_step != 1 || from.channels < kHalfRows) return false;
  for (std::int64_t i = 0; i < from.pixels; ++i) {
    _mm256_store_ps(to + i * kHalfRows, x.load(from.first + i * from.pixel_step));
  }
  return true;
}

/// `width` 0: any kernel.
template <int width, int stride, bool is_affine>
inline Sums<is_affine> sum_taps(const GroupedConvBlock& block, const float* x,
                                const float* weight) {
  const std::int64_t* const columns = block.plan.columns().data();
  const auto taps = static_cast<std::int64_t>(block.plan.columns().size());
  Sums<is_affine> sums;
  if constexpr (width == 0) {
    const std::int64_t step = block.plan.position_step();
    for (std::int64_t t = 0; t < taps; ++t) {
      add_tap(x + columns[t], step, weight + t * kHalfRows, sums);
    }
  } else {
    for (std::int64_t t = 0; t < taps; t += width) {
      add_line<width, stride>(x + columns[t], kHalfRows, weight + t * kHalfRows, sums);
    }
  }
  return sums;
}

/// The first `count` positions go `step` apart, the lanes of each together.
inline void store_vectors(const GroupedConvBlock& block, std::int64_t to, std::int64_t step,
                          std::int64_t count, std::int64_t lanes,
                          const __m256 (&values)[kHalfRows]) {
  if (block.args.type == FloatType::kF32 && count == kHalfRows && lanes == kHalfRows) {
    float* const y = static_cast<float*>(block.y) + to;
    QUANTAL_UNROLL for (int i = 0; i < kHalfRows; ++i) _mm256_storeu_ps(y + i * step, values[i]);
    return;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    store_rows(block.y, to + i * step, block.args.type, lanes, values[i]);
  }
}

template <int width, int stride, bool is_affine>
void run_channels(const GroupedConvBlock& block) {
  constexpr int kCount = kTogether<is_affine>;
  const std::int64_t row = block.at.row;
  const float* const weight = block.rows.weight + row * block.args.shape.taps();
  const RowFactors factors{_mm256_load_ps(block.rows.scale + row),
                           is_affine ? _mm256_load_ps(block.rows.shift + row) : _mm256_setzero_ps(),
                           _mm256_load_ps(block.rows.bias + row)};
  const __m256 x_scale = _mm256_set1_ps(block.x_scale);
  const std::int64_t step = block.plan.position_step();
  const bool is_planes = block.args.order == ChannelOrder::kPlanes;
  const Run* const end = block.plan.runs() + block.plan.runs_of(block.at);
  for (const Run* run = block.plan.runs(); run < end; ++run) {
    __m256 values[kHalfRows];
    QUANTAL_UNROLL for (int first = 0; first < kHalfRows; first += kCount) {
      const float* const x = block.input + run->begin + first * step;
      const Sums<is_affine> sums = sum_taps<width, stride, is_affine>(block, x, weight);
      QUANTAL_UNROLL for (int i = 0; i < kCount; ++i) {
        values[first + i] = factors.finish<is_affine>(sums.w_x[i], sums.x[i], x_scale);
      }
    }
    const std::int64_t to = block.begin + run->position * block.position_step;
    if (is_planes) {
      transpose(values);
      store_vectors(block, to, block.row_step, block.at.rows, run->count, values);
    } else {
      store_vectors(block, to, block.position_step, run->count, block.at.rows, values);
    }
  }
}

}  // namespace

void gather_floats__avx2(const ChannelPixels& from, float* to) {
  if (!gather(Floats{from.x, from.type}, from, to)) grouped_conv__portable.floats.gather(from, to);
}

void gather_codes__avx2(const ChannelPixels& from, float* to) {
  const Codes codes{static_cast<const std::int8_t*>(from.x)};
  if (!gather(codes, from, to)) grouped_conv__portable.codes.gather(from, to);
}

void run_channels__avx2(const GroupedConvBlock& block) {
  for_width(block.args.shape, [&]<int width, int stride>() {
    if (block.rows.shift != nullptr) return run_channels<width, stride, true>(block);
    run_channels<width, stride, false>(block);
  });
}

}  // namespace quantal::kernels

#pragma GCC pop_options
