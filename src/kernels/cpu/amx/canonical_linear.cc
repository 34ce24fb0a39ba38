// Linears over codes as they are saved, for AMX: rows are taken apart into tiles where they lie.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <utility>

#include "kernels/canonical_linear.h"
#include "kernels/cpu/avx512/bf16_tables.h"
#include "kernels/cpu/avx512/intrinsics.h"
#include "kernels/cpu/detect.h"
#include "kernels/for_qtype.h"
#include "kernels/scratch.h"

#pragma GCC push_options
#if !defined(QUANTAL_EMULATE)
#pragma GCC target( \
    "amx-tile,amx-bf16,amx-int8,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,avx2,fma,f16c")
#endif

#include "kernels/cpu/amx/canonical_source.h"
#include "kernels/cpu/amx/codes.h"
#include "kernels/cpu/amx/floats.h"

namespace quantal::kernels {
namespace {

// Byte rows are whole tiles, and groups are taken whole.
bool takes(const PackedLayout& layout) {
  const std::int64_t sections = layout.depth() / 4;
  return layout.spec().rows % (sections * kTileRows) == 0 && layout.group_columns(0) % 32 == 0;
}

template <QTypeId qtype, int bits>
void run(const IntegerLinearArgs& args, const CanonicalWeight& weight,
         const ParallelFor& parallel_for) {
  using Source = CanonicalSource<qtype, ByteLine<bits>>;
  multiply_codes<Source, bits>(args, Source(*args.layout, weight), parallel_for);
}

}  // namespace

bool linear_from_canonical__amx(const LinearArgs& args, const CanonicalWeight& weight,
                                const ParallelFor& parallel_for) {
  if (!takes(*args.layout)) return false;
  for_qtype(args.layout->spec().qtype, [&]<QTypeId qtype>() {
    const auto source = [&]<typename Line>() {
      return CanonicalSource<qtype, Line>(*args.layout, weight);
    };
    multiply_floats<qtype>(args, source, parallel_for);
  });
  return true;
}

bool linear_from_canonical__amx(const IntegerLinearArgs& args, const CanonicalWeight& weight,
                                const ParallelFor& parallel_for) {
  if (!takes(*args.layout)) return false;
  switch (args.layout->spec().qtype) {
    case QTypeId::kInt2:
      run<QTypeId::kInt2, 2>(args, weight, parallel_for);
      return true;
    case QTypeId::kInt4:
      run<QTypeId::kInt4, 4>(args, weight, parallel_for);
      return true;
    default:
      run<QTypeId::kInt8, 8>(args, weight, parallel_for);
      return true;
  }
}

}  // namespace quantal::kernels

#pragma GCC pop_options
