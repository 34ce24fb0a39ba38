#pragma once

// Included by this folder's files only, below their target pragma.

#include "kernels/cpu/amx/tile_job.h"
#include "kernels/cpu/detect.h"

namespace quantal::kernels {
namespace {

/// The Source of a packed weight.
template <typename LineType>
class PackedSource {
 public:
  using Line = LineType;
  static constexpr int kStreams = 4;
  static constexpr bool kIsFar = true;
  static constexpr int kTogether = 1;

  PackedSource(const PackedLayout& layout, const std::byte* weight)
      : layout_(layout), weight_(weight), ahead_(prefetch_bytes()) {}

  std::int64_t tile(std::int64_t index) const { return index; }

  void decode(std::int64_t tile, std::int64_t group, std::int64_t first, std::int64_t count,
              std::byte* steps) const {
    const std::byte* lines = at(tile) + layout_.group_offset(group) + first * kLineBytes;
    auto line = line_of(*this, tile, group);
    for (std::int64_t i = 0; i < count; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(lines) + ahead_, _MM_HINT_T0);
      line.load(lines);
      for_steps<Line::kSteps>([&](auto step) __attribute__((always_inline)) {
        _mm512_storeu_si512(steps + step * kLineBytes, line.template get<step>());
      });
      lines += kLineBytes, steps += Line::kSteps * kLineBytes;
    }
  }

  TileScales scales(std::int64_t tile, std::int64_t group) const {
    return {layout_, at(tile), group};
  }

 private:
  const std::byte* at(std::int64_t tile) const { return weight_ + tile * layout_.tile_bytes(); }

  const PackedLayout& layout_;
  const std::byte* weight_;
  std::int64_t ahead_;
};

}  // namespace
}  // namespace quantal::kernels
