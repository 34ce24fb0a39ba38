#pragma once

#include <cstring>
#include <utility>

#if defined(__clang__)
#define QUANTAL_UNROLL _Pragma("unroll")
#else
#define QUANTAL_UNROLL _Pragma("GCC unroll 16")
#endif

namespace quantal::kernels {
namespace {

/// A register, whatever the processor.
template <typename Element>
struct Register {
  static constexpr int kLanes = 16 / sizeof(Element);
  typedef Element Lanes __attribute__((vector_size(16)));

  static Lanes load(const Element* from) {
    Lanes lanes;
    std::memcpy(&lanes, from, sizeof(lanes));
    return lanes;
  }
  static void store(Lanes lanes, Element* to) { std::memcpy(to, &lanes, sizeof(lanes)); }

  /// Lanes begin, begin + 1, … of a and b in turn, of as many as fit.
  template <int begin>
  static Lanes both(Lanes a, Lanes b) {
    return [&]<int... i>(std::integer_sequence<int, i...>) {
      return __builtin_shufflevector(a, b, (begin + i / 2 + i % 2 * kLanes)...);
    }(std::make_integer_sequence<int, kLanes>());
  }
};

// Each step puts the first half of the rows between those of the second half: as many steps as an
// index has bits exchange rows and lanes.
template <typename Element, typename Lanes, int lanes>
inline __attribute__((always_inline)) void transpose_square(Lanes (&rows)[lanes]) {
  using Of = Register<Element>;
  static_assert(lanes == Of::kLanes);
  QUANTAL_UNROLL for (int step = 1; step < lanes; step *= 2) {
    Lanes next[lanes];
    QUANTAL_UNROLL for (int i = 0; i < lanes / 2; ++i) {
      next[2 * i] = Of::template both<0>(rows[i], rows[i + lanes / 2]);
      next[2 * i + 1] = Of::template both<lanes / 2>(rows[i], rows[i + lanes / 2]);
    }
    QUANTAL_UNROLL for (int i = 0; i < lanes; ++i) rows[i] = next[i];
  }
}

}  // namespace
}  // namespace quantal::kernels
