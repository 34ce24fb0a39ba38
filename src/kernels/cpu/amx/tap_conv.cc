// Convolution by taps for AMX: a tile of 16 tokens is 64 bytes of 16 pixels that are a stride apart
// in the input, and is multiplied by signed codes, so that no sums of tokens are needed.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels/cpu/avx512/intrinsics.h"
#include "kernels/cpu/detect.h"
#include "kernels/linear.h"
#include "kernels/scratch.h"
#include "kernels/tap_conv.h"

#pragma GCC push_options
#if !defined(QUANTAL_EMULATE)
#pragma GCC target("amx-tile,amx-int8,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#include "kernels/cpu/amx/tile_job.h"

namespace quantal::kernels {
namespace {

// Byte b of each word of four, as all four of them.
constexpr auto kSpread = [] {
  std::array<std::array<std::uint8_t, 64>, 4> order{};
  for (int b = 0; b < 4; ++b) {
    for (int i = 0; i < 64; ++i) order[b][i] = static_cast<std::uint8_t>(i % 16 / 4 * 4 + b);
  }
  return order;
}();

// One step: bytes of up to four lines, as signed codes; zeros for no column.
inline __m512i gather_step(const std::byte* lines, const TapStep& step) {
  const __m512i offset = _mm512_set1_epi8(static_cast<char>(0x80));
  __m512i words = offset;
  for_steps<4>([&](auto j) __attribute__((always_inline)) {
    const std::int32_t column = step.columns[j];
    if (column < 0) return;
    const __m512i line = _mm512_loadu_si512(lines + column / 4 * kLineBytes);
    const __m512i order = _mm512_loadu_si512(kSpread[column % 4].data());
    words = _mm512_mask_shuffle_epi8(words, __mmask64{0x1111111111111111} << j, line, order);
  });
  return _mm512_xor_si512(words, offset);
}

// Into tiles of steps, those of both tiles of rows in turn.
void decode_tiles(const TapPlan& plan, const PackedLayout& layout, const std::byte* weight,
                  int tiles, std::byte* panel) {
  const TapStep* steps = plan.steps();
  const std::int64_t count = plan.step_count();
  for (int j = 0; j < tiles; ++j) {
    const std::byte* lines = weight + j * layout.tile_bytes() + layout.group_offset(0);
    for (std::int64_t i = 0; i < count; ++i) {
      std::byte* to = panel + (i / kTileSteps * tiles + j) * kTileBytes + i % kTileSteps * kLineBytes;
      _mm512_storeu_si512(to, gather_step(lines, steps[i]));
    }
  }
}

/// What is done to the sums of 16 tokens.
template <FloatType type>
class TapStore {
 public:
  TapStore(const TapBlock& block, int tile)
      : scales_(block.layout, block.weight + tile * block.layout.tile_bytes(), 0),
        y_(static_cast<std::byte*>(block.y) + tile * kTileRows * size_of(type)),
        stride_(block.y_stride),
        lanes_(first_lanes(block.rows - tile * kTileRows)),
        x_scale_(_mm512_set1_ps(block.x_scale)),
        bias_(block.bias != nullptr ? load_floats(block.bias, tile * kTileRows, type, lanes_)
                                    : _mm512_setzero_ps()) {}

  inline __attribute__((always_inline)) void store(std::int64_t position,
                                                   const std::int32_t* totals) const {
    const __m512 total = _mm512_cvtepi32_ps(_mm512_loadu_si512(totals));
    const __m512 sum = _mm512_fmadd_ps(total, scales_.scale, _mm512_setzero_ps());
    store_floats(y_, position * stride_, type, lanes_, _mm512_fmadd_ps(sum, x_scale_, bias_));
  }

 private:
  TileScales scales_;
  std::byte* y_;
  std::int64_t stride_;
  __mmask16 lanes_;
  __m512 x_scale_, bias_;
};

/// Tokens of a slab one after the other, and which are positions.
class TokenWalk {
 public:
  TokenWalk(const TapPlan& plan, std::int64_t first)
      : pitch_(plan.pitch()), width_(plan.width()), column_(first % pitch_) {}

  bool is_position() const { return column_ < width_; }
  void advance() {
    if (++column_ == pitch_) column_ = 0;
  }

 private:
  std::int64_t pitch_, width_, column_;
};

template <FloatType type, int tiles>
class BlockProduct {
 public:
  explicit BlockProduct(const TapBlock& block)
      : block_(block),
        stores_{TapStore<type>(block, 0), TapStore<type>(block, tiles - 1)},
        walk_(block.plan, block.first) {}

  void run() {
    const TileRegisters registers;
    std::int64_t t = 0;
    for (; t + kTileTokens < block_.count; t += 2 * kTileTokens) multiply<2>(t);
    if (t < block_.count) multiply<1>(t);
  }

 private:
  template <int token_tiles>
  void multiply(std::int64_t token) {
    const std::int64_t stride = block_.plan.token_bytes();
    const std::int8_t* x = block_.x + token * stride;
    const std::byte* weight = block_.panel;
    for_tiles<token_tiles, tiles>(
        [](auto i, auto j) __attribute__((always_inline)) { zero_tile<i * tiles + j>(); });
    const TapRun* runs = block_.plan.runs();
    for (std::int64_t r = 0; r < block_.plan.run_count(); ++r) {
      const std::int8_t* run = x + runs[r].offset;
      for (std::int64_t k = 0; k < runs[r].units; ++k, run += kLineBytes) {
        for_steps<tiles>([&](auto j) __attribute__((always_inline)) {
          load_tile<kWeightTile + j>(weight + j * kTileBytes, kLineBytes);
        });
        weight += tiles * kTileBytes;
        for_steps<token_tiles>([&](auto i) __attribute__((always_inline)) {
          load_tile<kXTile + i>(run + i * kTileTokens * stride, stride);
          for_steps<tiles>([&](auto j) __attribute__((always_inline)) {
            add_signed_products<i * tiles + j, kXTile + i, kWeightTile + j>();
          });
        });
      }
    }
    alignas(64) std::int32_t totals[token_tiles * tiles][kTileWords];
    for_tiles<token_tiles, tiles>([&](auto i, auto j) __attribute__((always_inline)) {
      store_tile<i * tiles + j>(totals[i * tiles + j], kLineBytes);
    });
    for (int i = 0; i < token_tiles; ++i) {
      const std::int64_t count =
          std::min(kTileTokens, block_.count - token - i * kTileTokens);
      for (std::int64_t t = 0; t < count; ++t, walk_.advance()) {
        if (!walk_.is_position()) continue;
        for (int j = 0; j < tiles; ++j) {
          stores_[j].store(position_, totals[i * tiles + j] + t * kTileRows);
        }
        ++position_;
      }
    }
  }

  const TapBlock& block_;
  std::array<TapStore<type>, 2> stores_;
  TokenWalk walk_;
  std::int64_t position_ = 0;
};

template <FloatType type>
void multiply_typed(const TapBlock& block) {
  if (block.tiles == 1) return BlockProduct<type, 1>(block).run();
  BlockProduct<type, 2>(block).run();
}

void multiply_block(const TapBlock& block) {
  switch (block.type) {
    case FloatType::kF32:
      return multiply_typed<FloatType::kF32>(block);
    case FloatType::kBF16:
      return multiply_typed<FloatType::kBF16>(block);
    case FloatType::kF16:
      return multiply_typed<FloatType::kF16>(block);
  }
}

}  // namespace

const TapConvKernel tap_conv__amx{static_cast<int>(kTileSteps), decode_tiles, multiply_block};

}  // namespace quantal::kernels

#pragma GCC pop_options
