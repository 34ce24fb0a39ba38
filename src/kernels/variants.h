#pragma once

#include <initializer_list>

#include <quantal/isa.h>

/// One kernel for several instruction sets, and which of them runs.
namespace quantal::kernels {

template <typename Kernel>
struct Variant {
  Isa isa;
  Kernel kernel;
};

/// The instruction set whose kernels run where one has none of its own: a part of it.
constexpr Isa next_best(Isa isa) {
  switch (isa) {
    case Isa::kAmx:  // Intel's alone, whose products of bf16 without tiles are slow
    case Isa::kAvx512Bf16:
      return Isa::kAvx512Vbmi;
    case Isa::kAvx512Vbmi:
      return Isa::kAvx512Vnni;
    case Isa::kAvx512Vnni:
      return Isa::kAvx512;
    case Isa::kAvx512:
    case Isa::kAvxVnni:
      return Isa::kAvx2;
    case Isa::kNeonBf16:
      return Isa::kNeonI8mm;
    case Isa::kNeonI8mm:
      return Isa::kNeonDotprod;
    case Isa::kNeonDotprod:
      return Isa::kNeon;
    case Isa::kAvx2:
    case Isa::kNeon:
    case Isa::kPortable:
      return Isa::kPortable;
  }
  return Isa::kPortable;
}

/// The variant for `isa` or for the nearest of its parts. One of them is for kPortable.
template <typename Kernel>
Kernel best_variant(Isa isa, std::initializer_list<Variant<Kernel>> variants) {
  for (;; isa = next_best(isa)) {
    for (const Variant<Kernel>& variant : variants) {
      if (variant.isa == isa) return variant.kernel;
    }
    if (isa == Isa::kPortable) return {};
  }
}

}  // namespace quantal::kernels
