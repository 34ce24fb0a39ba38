// Convolution by taps for NEON with dot products (FEAT_DotProd): sdot adds four products to each of
// 4 rows.
#include <arm_neon.h>

#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>

#include "kernels/tap_conv.h"

#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")

#include "kernels/cpu/neon/rows.h"
#include "kernels/cpu/tap_product.h"

namespace quantal::kernels {
namespace {

constexpr int kUnitSteps = 4;  // sixteen codes of a token are one register

// [from][to]: byte `from` of each word goes to its byte `to`, zeros to the others.
constexpr auto kPicks = [] {
  std::array<std::array<std::array<std::uint8_t, 16>, 4>, 4> order{};
  for (int from = 0; from < 4; ++from) {
    for (int to = 0; to < 4; ++to) {
      for (int i = 0; i < 16; ++i) {
        order[from][to][i] = static_cast<std::uint8_t>(i % 4 == to ? i / 4 * 4 + from : 0xFF);
      }
    }
  }
  return order;
}();

// One step of a tile's lines: the bytes of up to four columns, as signed codes; zeros for none.
void gather_step(const std::byte* lines, const TapStep& step, std::byte* to) {
  const uint32x4_t bits = {1, 2, 4, 8};
  for (int q = 0; q < kQuarters; ++q) {
    uint8x16_t words = vdupq_n_u8(0);
    for (int j = 0; j < 4; ++j) {
      const std::int32_t column = step.columns[j];
      if (column < 0) continue;
      const uint8x16_t line = load_quarter(lines + column / 4 * kLineBytes + q * kQuarterBytes);
      const uint8x16_t codes = veorq_u8(line, vdupq_n_u8(0x80));
      words = vorrq_u8(words, vqtbl1q_u8(codes, vld1q_u8(kPicks[column % 4][j].data())));
    }
    const uint32x4_t rows = vdupq_n_u32(step.rows >> (q * kQuarterRows));
    words = vandq_u8(words, vreinterpretq_u8_u32(vtstq_u32(rows, bits)));
    vst1q_u8(reinterpret_cast<std::uint8_t*>(to + q * kQuarterBytes), words);
  }
}

// A tile after the other.
void decode_steps(const TapPlan& plan, const PackedLayout& layout, const std::byte* weight,
                  int tiles, std::byte* panel) {
  for (int j = 0; j < tiles; ++j) {
    const std::byte* lines = weight + j * layout.tile_bytes() + layout.group_offset(0);
    for (std::int64_t i = 0; i < plan.step_count(); ++i, panel += kLineBytes) {
      gather_step(lines, plan.steps()[i], panel);
    }
  }
}

struct LaneProduct {
  using Code = std::int8_t;
  static std::int64_t panel_bytes(const TapPlan& plan) { return plan.step_count() * kLineBytes; }

  template <int tokens, std::int64_t total_stride>
  static void multiply(const TapPlan& plan, const Code* x, std::int64_t stride,
                       const std::byte* panel, std::int32_t* totals) {
    int32x4_t sums[tokens][kQuarters];
    QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
      QUANTAL_UNROLL for (int q = 0; q < kQuarters; ++q) sums[t][q] = vdupq_n_s32(0);
    }
    const TapRun* runs = plan.runs();
    for (std::int64_t r = 0; r < plan.run_count(); ++r) {
      const std::int8_t* run = x + runs[r].offset;
      for (std::int64_t k = 0; k < runs[r].units; ++k, run += 4L * kUnitSteps) {
        int8x16_t values[tokens];
        QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) values[t] = vld1q_s8(run + t * stride);
        for_constants<kUnitSteps>([&](auto step) __attribute__((always_inline)) {
          QUANTAL_UNROLL for (int q = 0; q < kQuarters; ++q) {
            const int8x16_t weight = vreinterpretq_s8_u8(load_quarter(panel + q * kQuarterBytes));
            QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
              sums[t][q] = vdotq_laneq_s32(sums[t][q], weight, values[t], step);
            }
          }
          panel += kLineBytes;
        });
      }
    }
    QUANTAL_UNROLL for (int t = 0; t < tokens; ++t) {
      QUANTAL_UNROLL for (int q = 0; q < kQuarters; ++q) {
        vst1q_s32(totals + t * total_stride + q * kQuarterRows, sums[t][q]);
      }
    }
  }
};

template <FloatType type>
class TapStore {
 public:
  TapStore(const TapBlock& block, int tile)
      : scales_(block.layout, block.weight + tile * block.layout.tile_bytes(), 0),
        y_(static_cast<std::byte*>(block.y) + tile * kTileRows * size_of(type)),
        stride_(block.y_stride),
        x_scale_(vdupq_n_f32(block.x_scale)),
        rows_(std::clamp<std::int64_t>(block.rows - tile * kTileRows, 0, kTileRows)) {
    for (int q = 0; q < kQuarters; ++q) {
      const std::int64_t row = q * kQuarterRows;
      bias_[q] = rows_ > row ? load_bias(block.bias, tile * kTileRows + row, rows_ - row, type)
                             : vdupq_n_f32(0);
    }
  }

  void store(std::int64_t position, const std::int32_t* totals) const {
    for (int q = 0; q < kQuarters; ++q) {
      const std::int64_t row = q * kQuarterRows;
      if (rows_ <= row) return;
      const float32x4_t total = vcvtq_f32_s32(vld1q_s32(totals + row));
      const float32x4_t sum = vfmaq_f32(vdupq_n_f32(0), total, scales_.scale[q]);
      store_rows(y_, position * stride_ + row, type, std::min(kQuarterRows, rows_ - row),
                 vfmaq_f32(bias_[q], sum, x_scale_));
    }
  }

 private:
  TileScales scales_;
  std::byte* y_;
  std::int64_t stride_;
  float32x4_t x_scale_, bias_[kQuarters];
  std::int64_t rows_;
};

}  // namespace

// Costs as for AVX-VNNI: not measured.
const TapConvKernel tap_conv__neon_dotprod{
    .costs = {45, 10, 1.2F},
    .unit = kUnitSteps,
    .decode = decode_steps,
    .multiply = multiply_block<EachTile<LaneProduct>, TapStore>};

}  // namespace quantal::kernels

#pragma GCC pop_options
