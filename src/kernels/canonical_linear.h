#pragma once

#include "kernels/integer_linear.h"
#include "kernels/linear.h"

/// Linears over a weight that stays in canonical form: where others own its memory (a Python
/// module's parameters, which are saved, moved and shared like any tensor), it cannot be kept
/// packed.
namespace quantal::kernels {

/// The linear that find_linear() gives, over `weight`: args.layout is that of the whole weight,
/// args.weight is not read. Every thread packs a block of rows into its cache and computes with it,
/// so a call takes no memory of the weight's size. The same bits as over a packed weight.
QUANTAL_API void linear_from_canonical(Isa isa, const LinearArgs& args,
                                       const CanonicalWeight& weight,
                                       const ParallelFor& parallel_for);

/// The same with int8 activations. Precondition: find_integer_linear() has a kernel.
QUANTAL_API void integer_linear_from_canonical(Isa isa, const IntegerLinearArgs& args,
                                               const CanonicalWeight& weight,
                                               const ParallelFor& parallel_for);

}  // namespace quantal::kernels
