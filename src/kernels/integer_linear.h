#pragma once

#include "kernels/token_codes.h"

/// y = x · wᵀ + bias with int8 activations over a packed integer weight.
namespace quantal::kernels {

/// Arguments of an integer linear. Checked by the caller: kernels trust them.
struct IntegerLinearArgs {
  const PackedLayout* layout = nullptr;  ///< int8, int4 or int2
  const std::byte* weight = nullptr;
  TokenSource source;
  FloatType type = FloatType::kF32;  ///< of y and bias
  void* y = nullptr;                 ///< (tokens, rows)
  std::int64_t y_stride = 0;
  const void* bias = nullptr;  ///< (rows), or null
};

/// Every kernel gives the same bits, on any number of threads. With S = Σ code_w·code_x and
/// X = Σ code_x, exact, of each block of each group in order:
///   sum = fma(S, scale_w, sum);  sum = fma(X, −shift_w, sum) for affine types;
///   y = fma(sum, scale_x, bias), in fp32, rounded to `type`.
using IntegerLinearKernel = void (*)(const IntegerLinearArgs& args,
                                     const ParallelFor& parallel_for);

/// The kernel of an instruction set, or null where it has none for that weight (float8).
QUANTAL_API IntegerLinearKernel find_integer_linear(Isa isa, const WeightSpec& spec);

/// The same as int8 codes (tokens, rows) of `y_scale`, to which numbers of `args.type` are rounded
/// as quantize_codes() does: a block of tokens at a time, args.y is not used. False where a number
/// is NaN; the codes are then unspecified. Precondition: there is a kernel.
QUANTAL_API bool integer_linear_codes(Isa isa, const IntegerLinearArgs& args, float y_scale,
                                      std::int8_t* codes,
                                      const ParallelFor& parallel_for = serial_for);

void integer_linear__portable(const IntegerLinearArgs& args, const ParallelFor& parallel_for);
void integer_linear__avx2(const IntegerLinearArgs& args, const ParallelFor& parallel_for);
void integer_linear__avx_vnni(const IntegerLinearArgs& args, const ParallelFor& parallel_for);
void integer_linear__avx512(const IntegerLinearArgs& args, const ParallelFor& parallel_for);
void integer_linear__avx512_vnni(const IntegerLinearArgs& args, const ParallelFor& parallel_for);
void integer_linear__amx(const IntegerLinearArgs& args, const ParallelFor& parallel_for);
void integer_linear__neon(const IntegerLinearArgs& args, const ParallelFor& parallel_for);
void integer_linear__neon_dotprod(const IntegerLinearArgs& args, const ParallelFor& parallel_for);
void integer_linear__neon_i8mm(const IntegerLinearArgs& args, const ParallelFor& parallel_for);

}  // namespace quantal::kernels
