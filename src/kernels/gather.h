#pragma once

#include <cstdint>

#include <quantal/isa.h>

#include "kernels/canonical_codes.h"
#include "kernels/packed_layout.h"

/// Rows of a weight in canonical form as floats: what an embedding looks up, and all of it.
namespace quantal::kernels {

/// Rows `indices[i]` of the weight as `type`, (count, columns) at y: scale · code (− shift) in
/// fp32, rounded once; fp16 saturates. Preconditions: indices are in range; 8-bit types have
/// group_size 0.
QUANTAL_API void gather_rows(Isa isa, const WeightSpec& spec, const CanonicalWeight& weight,
                             const std::int64_t* indices, std::int64_t count, FloatType type,
                             void* y, const ParallelFor& parallel_for = serial_for);

/// The same for rows [first, first + count), in their order.
QUANTAL_API void dequantize_canonical(Isa isa, const WeightSpec& spec,
                                      const CanonicalWeight& weight, std::int64_t first,
                                      std::int64_t count, FloatType type, void* y,
                                      const ParallelFor& parallel_for = serial_for);

/// What all of its rows have in common.
struct Gather {
  const WeightSpec& spec;
  const CanonicalCodes& codes;
  const CanonicalWeight& weight;
  const std::int64_t* indices;  ///< null: rows in order, from `first` on
  FloatType type;
  void* y;
  std::int64_t first = 0;

  std::int64_t row(std::int64_t i) const { return indices != nullptr ? indices[i] : first + i; }
};

// Rows [begin, end) of y, per instruction set.
void gather_rows__portable(const Gather& gather, std::int64_t begin, std::int64_t end);
void gather_rows__avx2(const Gather& gather, std::int64_t begin, std::int64_t end);
void gather_rows__neon(const Gather& gather, std::int64_t begin, std::int64_t end);

}  // namespace quantal::kernels
