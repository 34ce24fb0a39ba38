// Depthwise convolution for AVX2 with FMA, 8 channels at a time, of pixels whose channels lie
// together: nothing is copied.
#include "kernels/grouped_conv.h"

#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#include "kernels/cpu/avx2/grouped_sums.h"

namespace quantal::kernels {
namespace {

constexpr std::int64_t kMostTapLines = DepthwiseLine::kMostTapLines;

/// `width` 0: any kernel.
template <int width, int stride, bool is_affine, typename Number>
class Line {
 public:
  explicit Line(const DepthwiseLine& line)
      : line_(line),
        shape_(line.args.shape),
        channels_(shape_.channels),
        tap_lines_(shape_.kernel[0] * shape_.kernel[1]) {
    find_tap_lines();
  }

  void run() const {
    const std::int64_t width_out = shape_.output()[2], step = shape_.stride[2];
    const std::int64_t reach = (shape_.kernel[2] - 1) * shape_.dilation[2];
    const std::int64_t last = shape_.input[2] + shape_.padding[2] - reach - 1;
    // Positions all of whose taps are inside.
    const std::int64_t begin = std::min((shape_.padding[2] + step - 1) / step, width_out);
    const std::int64_t end = last < 0 ? begin : std::clamp(last / step + 1, begin, width_out);
    for (std::int64_t w = 0; w < begin; ++w) run_edge(w);
    const std::int64_t rest = run_all<kTogether<is_affine>>(begin, end);
    for (std::int64_t w = run_all<kFew>(rest, end); w < end; ++w) run_edge(w);
    for (std::int64_t w = end; w < width_out; ++w) run_edge(w);
  }

 private:
  static constexpr int kFew = 4;

  /// Pixel 0 of a line that the kernel covers; step 0 and zeros where that is padding.
  struct TapLine {
    const Number* x;
    std::int64_t step;
  };

  void find_tap_lines() {
    static constexpr Number kZeros[kHalfRows] = {};
    TapLine* to = tap_line_;
    std::int64_t depth = line_.depth * shape_.stride[0] - shape_.padding[0];
    for (std::int64_t k = 0; k < shape_.kernel[0]; ++k, depth += shape_.dilation[0]) {
      std::int64_t height = line_.line * shape_.stride[1] - shape_.padding[1];
      for (std::int64_t i = 0; i < shape_.kernel[1]; ++i, height += shape_.dilation[1]) {
        const bool is_inside =
            depth >= 0 && depth < shape_.input[0] && height >= 0 && height < shape_.input[1];
        const std::int64_t before =
            (line_.sample * shape_.input[0] + depth) * shape_.input[1] + height;
        const auto* const x = static_cast<const Number*>(line_.args.x);
        *to++ = is_inside ? TapLine{x + before * shape_.input[2] * channels_, channels_}
                          : TapLine{kZeros, 0};
      }
    }
  }

  RowFactors factors(std::int64_t c) const {
    return {_mm256_load_ps(line_.rows.scale + c),
            is_affine ? _mm256_load_ps(line_.rows.shift + c) : _mm256_setzero_ps(),
            _mm256_load_ps(line_.rows.bias + c)};
  }

  /// Positions [begin, end), `count` at a time and rather some twice than one by one. Tells where
  /// it ended: at `begin` where they are fewer.
  template <int count>
  std::int64_t run_all(std::int64_t begin, std::int64_t end) const {
    if (end - begin < count) return begin;
    for (std::int64_t w = begin; w < end; w += count)
      run_positions<count>(std::min(w, end - count));
    return end;
  }

  /// From position w on.
  template <int count>
  void run_positions(std::int64_t w) const {
    const std::int64_t pixel = w * shape_.stride[2] - shape_.padding[2];
    const std::int64_t taps = shape_.kernel[2];
    const float* weight = line_.rows.weight;
    for (std::int64_t c = 0; c < channels_; c += kHalfRows) {
      Sums<is_affine, count> sums;
      for (std::int64_t t = 0; t < tap_lines_; ++t, weight += taps * kHalfRows) {
        const std::int64_t step = tap_line_[t].step;
        const Number* const x = tap_line_[t].x + (step == 0 ? 0 : pixel * step + c);
        if constexpr (width != 0) {
          add_line<width, stride>(x, step, weight, sums);
        } else {
          for (std::int64_t k = 0; k < taps; ++k) {
            add_tap(x + k * shape_.dilation[2] * step, shape_.stride[2] * step,
                    weight + k * kHalfRows, sums);
          }
        }
      }
      const RowFactors row = factors(c);
      const __m256 x_scale = _mm256_set1_ps(line_.x_scale);
      float* const y = line_.y + w * channels_ + c;
      QUANTAL_UNROLL for (int i = 0; i < count; ++i) {
        _mm256_storeu_ps(y + i * channels_,
                         row.template finish<is_affine>(sums.w_x[i], sums.x[i], x_scale));
      }
    }
  }

  /// Position w, taps of which may be outside.
  void run_edge(std::int64_t w) const {
    const std::int64_t taps = shape_.kernel[2], dilation = shape_.dilation[2];
    const std::int64_t pixel = w * shape_.stride[2] - shape_.padding[2];
    const std::int64_t after = shape_.input[2] - pixel;
    Edge edge{w, pixel, std::min(pixel >= 0 ? 0 : (dilation - 1 - pixel) / dilation, taps), 0};
    edge.end = after <= 0 ? edge.begin : std::clamp((after - 1) / dilation + 1, edge.begin, taps);
    std::int64_t c = 0;
    for (; c + kFew * kHalfRows <= channels_; c += kFew * kHalfRows) run_edge<kFew>(edge, c);
    for (; c < channels_; c += kHalfRows) run_edge<1>(edge, c);
  }

  struct Edge {
    std::int64_t position, pixel;  ///< which the first tap reads
    std::int64_t begin, end;       ///< of the taps inside
  };

  /// Of `count` times 8 channels: sums that do not wait for each other.
  template <int count>
  void run_edge(const Edge& edge, std::int64_t c) const {
    const std::int64_t line_weight = shape_.kernel[2] * kHalfRows, next = shape_.taps() * kHalfRows;
    const float* weight = line_.rows.weight + c * shape_.taps();
    Sums<is_affine, count> sums;
    for (std::int64_t t = 0; t < tap_lines_; ++t, weight += line_weight) {
      const std::int64_t step = tap_line_[t].step;
      if (step == 0) continue;
      for (std::int64_t k = edge.begin; k < edge.end; ++k) {
        const Number* const x = tap_line_[t].x + (edge.pixel + k * shape_.dilation[2]) * step + c;
        QUANTAL_UNROLL for (int i = 0; i < count; ++i) {
          sums.add(i, load_pixel(x + i * kHalfRows),
                   _mm256_load_ps(weight + k * kHalfRows + i * next));
        }
      }
    }
    const __m256 x_scale = _mm256_set1_ps(line_.x_scale);
    float* const y = line_.y + edge.position * channels_ + c;
    QUANTAL_UNROLL for (int i = 0; i < count; ++i) {
      const __m256 sum =
          factors(c + i * kHalfRows).template finish<is_affine>(sums.w_x[i], sums.x[i], x_scale);
      _mm256_storeu_ps(y + i * kHalfRows, sum);
    }
  }

  const DepthwiseLine& line_;
  const ConvShape& shape_;
  std::int64_t channels_, tap_lines_;
  TapLine tap_line_[kMostTapLines];
};

template <int width, int stride>
void run(const DepthwiseLine& line) {
  if (line.args.codes == nullptr) return Line<width, stride, false, float>(line).run();
  if (line.rows.shift != nullptr) return Line<width, stride, true, std::int8_t>(line).run();
  Line<width, stride, false, std::int8_t>(line).run();
}

}  // namespace

void depthwise_line__avx2(const DepthwiseLine& line) {
  for_width(line.args.shape, [&]<int width, int stride>() { run<width, stride>(line); });
}

}  // namespace quantal::kernels

#pragma GCC pop_options
