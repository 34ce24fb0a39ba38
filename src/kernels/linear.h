#pragma once

#include <cstdint>

#include <quantal/isa.h>

#include "kernels/packed_layout.h"

/// y = x · wᵀ + bias over a packed weight.
namespace quantal::kernels {

/// Arguments of a weight-only linear. Checked by the caller: kernels trust them.
struct LinearArgs {
  const PackedLayout* layout = nullptr;
  const std::byte* weight = nullptr;
  std::int64_t tokens = 0;
  FloatType type = FloatType::kF32;  ///< of x, y and bias
  const void* x = nullptr;           ///< (tokens, columns); elements of a token are contiguous
  std::int64_t x_stride = 0;         ///< elements from one token to the next
  void* y = nullptr;                 ///< (tokens, rows)
  std::int64_t y_stride = 0;
  const void* bias = nullptr;  ///< (rows), or null
};

/// Dequantizes, multiplies and adds in fp32 and rounds once, to `type`. The same bits for any
/// number of threads.
using LinearKernel = void (*)(const LinearArgs& args, const ParallelFor& parallel_for);

/// The kernel of an instruction set, or null where it has none for that weight.
QUANTAL_API LinearKernel find_linear(Isa isa, const WeightSpec& spec);

/// Rows `indices[i]` of the weight as `type`: what an embedding gathers. (count, columns) at y.
QUANTAL_API void dequantize_rows(const PackedLayout& layout, const std::byte* weight,
                                 const std::int64_t* indices, std::int64_t count, FloatType type,
                                 void* y, const ParallelFor& parallel_for = serial_for);

/// Rows [begin, begin + count) of the weight as `type`, (count, columns) at y.
QUANTAL_API void dequantize_range(Isa isa, const PackedLayout& layout, const std::byte* weight,
                                  std::int64_t begin, std::int64_t count, FloatType type, void* y,
                                  const ParallelFor& parallel_for = serial_for);

/// Columns [first, …) of a group of a row, as `type`, at y[index].
void dequantize_part(const PackedLayout& layout, const std::byte* weight, std::int64_t row,
                     std::int64_t group, std::int64_t first, FloatType type, void* y,
                     std::int64_t index);

/// The same for rows [begin, end) where row `first_row` is the first at y, per instruction set.
using DequantizeRange = void (*)(const PackedLayout& layout, const std::byte* weight,
                                 std::int64_t first_row, std::int64_t begin, std::int64_t end,
                                 FloatType type, void* y);
QUANTAL_API DequantizeRange find_dequantize_range(Isa isa);

void dequantize_range__portable(const PackedLayout& layout, const std::byte* weight,
                                std::int64_t first_row, std::int64_t begin, std::int64_t end,
                                FloatType type, void* y);
void dequantize_range__avx2(const PackedLayout& layout, const std::byte* weight,
                            std::int64_t first_row, std::int64_t begin, std::int64_t end,
                            FloatType type, void* y);
void dequantize_range__neon(const PackedLayout& layout, const std::byte* weight,
                            std::int64_t first_row, std::int64_t begin, std::int64_t end,
                            FloatType type, void* y);

void linear__portable(const LinearArgs& args, const ParallelFor& parallel_for);
void linear__avx2(const LinearArgs& args, const ParallelFor& parallel_for);
void linear__avx512(const LinearArgs& args, const ParallelFor& parallel_for);
void linear__avx512_vbmi(const LinearArgs& args, const ParallelFor& parallel_for);
void linear__avx512_bf16(const LinearArgs& args, const ParallelFor& parallel_for);
void linear__amx(const LinearArgs& args, const ParallelFor& parallel_for);
void linear__neon(const LinearArgs& args, const ParallelFor& parallel_for);
void linear__neon_bf16(const LinearArgs& args, const ParallelFor& parallel_for);

/// Scales and shifts of one group of a tile, as fp32.
struct GroupScales {
  float scale[PackedLayout::kTileRows];
  float shift[PackedLayout::kTileRows];  ///< zeros for symmetric types
};
GroupScales load_scales(const PackedLayout& layout, const std::byte* tile, std::int64_t group);

/// The number that a packed code stands for, before scale and shift.
float code_value(QTypeId qtype, std::uint8_t packed);

}  // namespace quantal::kernels
