#pragma once

#include <cstdint>

#include <quantal/isa.h>

#include "kernels/canonical_codes.h"
#include "kernels/packed_layout.h"

/// A float weight to codes, scales and shifts in canonical form, by the extremes of each group
/// (docs/numerics.md). Scale, shift and codes of a few groups are made while they are in the cache:
/// the weight is read from memory once.
namespace quantal::kernels {

/// Checked by the caller: kernels trust them.
struct QuantizeArgs {
  WeightSpec spec;  ///< scale_type: what scale and shift are rounded to, fp32 or `type`
  const void* weight = nullptr;  ///< (rows, columns), dense and not empty
  FloatType type = FloatType::kF32;
  MutableCanonicalWeight out;
};

/// What became of it.
enum class Quantized : std::uint8_t {
  kDone,
  /// spec.scale_type cannot hold some scale or shift. All of them then stay fp32: call again.
  kNeedsFloatScales,
  /// The weight has a NaN or infinity, or numbers so large that values need fp64.
  kNotInFloat,
};

/// Unless kDone comes back, what is at args.out is unspecified. The same bits for any number of
/// threads and on every instruction set. Precondition: 8-bit types have group_size 0.
QUANTAL_API Quantized quantize_weight(Isa isa, const QuantizeArgs& args,
                                      const ParallelFor& parallel_for = serial_for);

/// The bounds of a scale, and what the largest code stands for.
struct ScaleBounds {
  float levels;    ///< a range divided by this is a scale
  float smallest;  ///< keeps scale · smallest code a normal number
  float largest;   ///< keeps scale · levels finite
};
ScaleBounds scale_bounds(QTypeId qtype);

/// What a kernel saw in some groups; merged over all of them.
struct GroupsSeen {
  bool is_finite = true;        ///< every element, and every group's range
  bool is_exact_enough = true;  ///< scale_type holds every scale and shift
  float largest_scale = 0;      ///< as stored
  float largest_shift = 0;      ///< its size
};

// Byte rows [begin, end), per instruction set.
GroupsSeen quantize_rows__portable(const QuantizeArgs& args, const CanonicalCodes& codes,
                                   std::int64_t begin, std::int64_t end);
GroupsSeen quantize_rows__avx2(const QuantizeArgs& args, const CanonicalCodes& codes,
                               std::int64_t begin, std::int64_t end);

}  // namespace quantal::kernels
