// Max pooling of codes for AVX2: the loops as the compiler vectorizes them.
#include "kernels/max_pool.h"

#pragma GCC push_options
#pragma GCC target("avx2")

#include "kernels/max_pool_loops.h"

namespace quantal::kernels {

MaxPoolKernel max_pool__avx2() { return {raise_to, reduce_to}; }

}  // namespace quantal::kernels

#pragma GCC pop_options
