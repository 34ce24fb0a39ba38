#pragma once

#include <cstdint>
#include <vector>

#include <quantal/isa.h>

namespace quantal::kernels {

/// What this processor and operating system can run, best first; kPortable is always the last.
std::vector<Isa> detect_isas();

#if defined(__x86_64__)

/// What an x86 processor says of itself.
struct CpuFeatures {
  std::uint32_t leaf1_ecx = 0;
  std::uint32_t leaf7_ebx = 0, leaf7_ecx = 0, leaf7_edx = 0;
  std::uint32_t leaf7_1_eax = 0;
  bool is_intel = false;
  /// The operating system lets this process use AMX's tiles, which it must ask for.
  bool permits_tiles = false;
  /// The registers that the operating system saves (XCR0): an instruction set is usable only with
  /// its own among them.
  std::uint64_t saved = 0;
};
QUANTAL_API std::vector<Isa> isas_of(const CpuFeatures& cpu);

/// Whether the processor has products of bf16 that are faster than those of fp32, whatever kernels
/// run with: AMX, or AVX-512 BF16 but Intel's.
QUANTAL_API bool multiplies_bf16_fast(const CpuFeatures& cpu);

/// How far ahead kernels of AVX-512 fetch a weight that few tokens read.
std::int64_t prefetch_bytes();

#endif

/// The same of this processor; false where nothing is known of it.
QUANTAL_API bool multiplies_bf16_fast();

}  // namespace quantal::kernels
