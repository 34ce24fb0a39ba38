#include "kernels/cpu/detect.h"

#include "kernels/cpu/neon/detect.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <utility>
#endif

namespace quantal::kernels {

#if defined(__x86_64__)

namespace {

bool has(std::uint32_t word, int bit) { return (word >> bit & 1U) != 0; }

bool has_tiles(const CpuFeatures& cpu) {
  constexpr int kAmxTile = 24;
  constexpr std::uint64_t kTiles = 0b11 << 17;
  return has(cpu.leaf7_edx, kAmxTile) && (cpu.saved & kTiles) == kTiles;
}

bool ask_for_tiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, Linux 5.16
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

CpuFeatures read_features() {
  constexpr int kOsxsave = 27;
  CpuFeatures cpu;
  std::uint32_t a, b, c, d;
  if (__get_cpuid_count(0, 0, &a, &b, &c, &d) != 0) {
    cpu.is_intel = b == signature_INTEL_ebx && c == signature_INTEL_ecx && d == signature_INTEL_edx;
  }
  if (__get_cpuid_count(1, 0, &a, &b, &c, &d) != 0) cpu.leaf1_ecx = c;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) != 0) {
    cpu.leaf7_ebx = b;
    cpu.leaf7_ecx = c;
    cpu.leaf7_edx = d;
    const bool has_subleaf = a >= 1;
    if (has_subleaf && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0) cpu.leaf7_1_eax = a;
  }
  if (has(cpu.leaf1_ecx, kOsxsave)) {
    std::uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    cpu.saved = static_cast<std::uint64_t>(high) << 32 | low;
  }
  cpu.permits_tiles = has_tiles(cpu) && ask_for_tiles();
  return cpu;
}

const CpuFeatures& features() {
  static const CpuFeatures cpu = read_features();
  return cpu;
}

bool runs_avx2(const CpuFeatures& cpu) {
  constexpr int kFma = 12, kAvx = 28, kF16c = 29, kAvx2 = 5;
  constexpr std::uint64_t kXmmAndYmm = 0b110;
  return has(cpu.leaf1_ecx, kFma) && has(cpu.leaf1_ecx, kAvx) && has(cpu.leaf1_ecx, kF16c) &&
         has(cpu.leaf7_ebx, kAvx2) && (cpu.saved & kXmmAndYmm) == kXmmAndYmm;
}

bool runs_avx512(const CpuFeatures& cpu) {
  constexpr int kF = 16, kDq = 17, kBw = 30, kVl = 31;
  constexpr std::uint64_t kOpmaskAndZmm = 0b11100000;
  const std::uint32_t word = cpu.leaf7_ebx;
  return has(word, kF) && has(word, kDq) && has(word, kBw) && has(word, kVl) &&
         (cpu.saved & kOpmaskAndZmm) == kOpmaskAndZmm;
}

}  // namespace

std::vector<Isa> isas_of(const CpuFeatures& cpu) {
  constexpr int kAvxVnni = 4, kAvx512Vnni = 11, kAvx512Bf16 = 5, kAvx512Vbmi = 1;
  std::vector<Isa> found{Isa::kPortable};
  const auto add = [&](Isa isa) { found.insert(found.begin(), isa); };
  if (!runs_avx2(cpu)) return found;
  add(Isa::kAvx2);
  if (has(cpu.leaf7_1_eax, kAvxVnni)) add(Isa::kAvxVnni);
  // From here on each has what those before it have.
  if (!runs_avx512(cpu)) return found;
  add(Isa::kAvx512);
  if (!has(cpu.leaf7_ecx, kAvx512Vnni)) return found;
  add(Isa::kAvx512Vnni);
  if (!has(cpu.leaf7_ecx, kAvx512Vbmi)) return found;
  add(Isa::kAvx512Vbmi);
  if (!has(cpu.leaf7_1_eax, kAvx512Bf16)) return found;
  add(Isa::kAvx512Bf16);
  // Intel's multiply half as many pairs of bf16 a cycle as AMD's, which is half as many numbers as
  // of fp32 (benchmarks/limits.cc: 172 and 350 GFLOP/s on Emerald Rapids, 845 and 456 on Zen 5).
  if (cpu.is_intel) std::swap(found[0], found[1]);
  constexpr int kAmxBf16 = 22, kAmxInt8 = 25;
  const bool has_products = has(cpu.leaf7_edx, kAmxBf16) && has(cpu.leaf7_edx, kAmxInt8);
  if (has_tiles(cpu) && has_products && cpu.permits_tiles) add(Isa::kAmx);
  return found;
}

std::vector<Isa> detect_isas() { return isas_of(features()); }

bool multiplies_bf16_fast(const CpuFeatures& cpu) {
  constexpr int kAmxBf16 = 22, kAvx512Bf16 = 5;
  const bool has_amx = has(cpu.leaf7_edx, kAmxBf16) && has_tiles(cpu) && cpu.permits_tiles;
  return has_amx || (runs_avx512(cpu) && has(cpu.leaf7_1_eax, kAvx512Bf16) && !cpu.is_intel);
}

bool multiplies_bf16_fast() {
  static const bool is_fast = multiplies_bf16_fast(features());
  return is_fast;
}

std::int64_t prefetch_bytes() {
  // Emerald Rapids reads int4 weights 28 % slower with 1 KiB, Zen 4 all of them 2 to 8 % slower
  // with 2.
  static const std::int64_t bytes = features().is_intel ? 2048 : 1024;
  return bytes;
}

#else

std::vector<Isa> detect_isas() {
  std::vector<Isa> found = detect_neon();
  found.push_back(Isa::kPortable);
  return found;
}

bool multiplies_bf16_fast() { return false; }

#endif

}  // namespace quantal::kernels
