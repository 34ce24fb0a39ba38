#pragma once

#include "kernels/float_conv.h"
#include "kernels/integer_linear.h"
#include "kernels/linear.h"

/// Linears and convolutions over a weight that stays in canonical form: where others own its memory
/// (a Python module's parameters, which are saved, moved and shared like any tensor), it cannot be
/// kept packed.
namespace quantal::kernels {

/// The linear that find_linear() gives, over `weight`: args.layout is that of the whole weight,
/// args.weight is not read. A few tokens are multiplied by rows as they lie, where the processor
/// has a kernel for that; for more, block after block of rows is packed into a cache and
/// multiplied, so a call takes no memory of the weight's size. The same bits for any number of
/// threads.
QUANTAL_API void linear_from_canonical(Isa isa, const LinearArgs& args,
                                       const CanonicalWeight& weight,
                                       const ParallelFor& parallel_for);

/// The same with int8 activations, and the same bits as over a packed weight. Precondition:
/// find_integer_linear() has a kernel.
QUANTAL_API void integer_linear_from_canonical(Isa isa, const IntegerLinearArgs& args,
                                               const CanonicalWeight& weight,
                                               const ParallelFor& parallel_for);

/// float_conv() in the same way. Precondition: find_float_conv(isa).
QUANTAL_API void float_conv_from_canonical(Isa isa, const FloatConvArgs& args,
                                           const CanonicalWeight& weight,
                                           const ParallelFor& parallel_for);

/// Tokens that are multiplied by rows as they lie.
constexpr std::int64_t kFewCanonicalTokens = 4;

/// At most that many tokens, one or more. Precondition: rows of whole bytes and of whole groups
/// (canonical_linear.cc).
void few_from_canonical__avx2(const LinearArgs& args, const CanonicalWeight& weight,
                              const ParallelFor& parallel_for);
void few_from_canonical__avx512(const LinearArgs& args, const CanonicalWeight& weight,
                                const ParallelFor& parallel_for);
void few_from_canonical__avx512_vbmi(const LinearArgs& args, const CanonicalWeight& weight,
                                     const ParallelFor& parallel_for);
void few_from_canonical__avx2(const IntegerLinearArgs& args, const CanonicalWeight& weight,
                              const ParallelFor& parallel_for);

/// Any number of tokens, with the bits of the packed weight where linear__amx() multiplies in
/// tiles; false, and nothing was done, for shapes that it does not take. The same preconditions.
bool linear_from_canonical__amx(const LinearArgs& args, const CanonicalWeight& weight,
                                const ParallelFor& parallel_for);
bool linear_from_canonical__amx(const IntegerLinearArgs& args, const CanonicalWeight& weight,
                                const ParallelFor& parallel_for);

}  // namespace quantal::kernels
