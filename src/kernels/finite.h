#pragma once

#include <cstdint>

#include <quantal/isa.h>

#include "kernels/packed_layout.h"

namespace quantal::kernels {

/// The index of the first NaN or infinity among `count` numbers, or -1.
QUANTAL_API std::int64_t find_non_finite(Isa isa, const void* x, FloatType type, std::int64_t count,
                                         const ParallelFor& parallel_for = serial_for);

// Among elements [begin, end), per instruction set.
std::int64_t find_non_finite__portable(const void* x, FloatType type, std::int64_t begin,
                                       std::int64_t end);
std::int64_t find_non_finite__avx2(const void* x, FloatType type, std::int64_t begin,
                                   std::int64_t end);

}  // namespace quantal::kernels
