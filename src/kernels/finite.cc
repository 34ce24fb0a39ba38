#include "kernels/finite.h"

#include <algorithm>
#include <atomic>

namespace quantal::kernels {
namespace {

// What a thread looks at before it sees whether another one found something in front of it.
constexpr std::int64_t kChunk = 1 << 16;

template <typename Word>
std::int64_t find_all_ones(const void* x, Word exponent, std::int64_t begin, std::int64_t end) {
  const auto* words = static_cast<const Word*>(x);
  for (std::int64_t i = begin; i < end; ++i) {
    if ((words[i] & exponent) == exponent) return i;
  }
  return -1;
}

}  // namespace

std::int64_t find_non_finite__portable(const void* x, FloatType type, std::int64_t begin,
                                       std::int64_t end) {
  switch (type) {
    case FloatType::kF32:
      return find_all_ones<std::uint32_t>(x, 0x7F800000, begin, end);
    case FloatType::kBF16:
      return find_all_ones<std::uint16_t>(x, 0x7F80, begin, end);
    case FloatType::kF16:
      return find_all_ones<std::uint16_t>(x, 0x7C00, begin, end);
  }
  return -1;
}

std::int64_t find_non_finite(Isa isa, const void* x, FloatType type, std::int64_t count,
                             const ParallelFor& parallel_for) {
  std::atomic<std::int64_t> first{count};
  parallel_for((count + kChunk - 1) / kChunk, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin * kChunk; i < std::min(count, end * kChunk); i += kChunk) {
      if (i >= first) return;
      const std::int64_t stop = std::min(count, i + kChunk);
#if defined(__x86_64__)
      const std::int64_t found = isa != Isa::kPortable
                                     ? find_non_finite__avx2(x, type, i, stop)
                                     : find_non_finite__portable(x, type, i, stop);
#else
      const std::int64_t found = find_non_finite__portable(x, type, i, stop);
#endif
      if (found < 0) continue;
      std::int64_t known = first;
      while (found < known && !first.compare_exchange_weak(known, found)) {
      }
      return;
    }
  });
  return first < count ? first.load() : -1;
}

}  // namespace quantal::kernels
